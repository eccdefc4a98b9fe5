"""Spaces at the start of an answer that continues a text."""

from collections.abc import Collection

from flashmoe_mlx.generation.job import Token
from flashmoe_mlx.serving.openai.token_bytes import TokenBytes


class FirstSpaces:
    """Restores the spaces that mlx-lm's detokenizers drop at the start of an answer.

    Args:
        token_bytes (TokenBytes): The vocabulary.
        ends (Collection[int]): Tokens that end an answer.
    """

    def __init__(self, token_bytes: TokenBytes, ends: Collection[int]):
        self._token_bytes, self._ends = token_bytes, ends
        # Bytes of the first tokens, until some text comes.
        self._first: bytes | None = b""

    def text(self, token: Token, last: bool) -> str:
        """Return the text of the next token, with the spaces before it if it is the first text.

        Args:
            token (Token): The token.
            last (bool): It is the last one.
        """
        if self._first is None:
            return token.text
        self._first += b"" if token.id in self._ends else self._token_bytes.of(token.id)
        if not token.text and not last:
            return token.text
        first, self._first = self._first.decode(errors="replace").rstrip("\ufffd"), None
        dropped = first.removesuffix(token.text.rstrip("\ufffd"))
        return dropped + token.text if dropped.strip(" ") == "" else token.text
