"""Bytes and texts of single tokens."""

from typing import Any


class TokenBytes:
    """Says which bytes each token stands for; of some tokens they are only a part of a character.

    Args:
        vocabulary (LLTokenizer): From :func:`flashmoe_mlx.constrain.vocabulary_of`.
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary

    def of(self, token: int) -> bytes:
        """Return the bytes of a token; none of an index that the vocabulary does not have."""
        return bytes(self._vocabulary.decode_bytes([token])) if token < self._vocabulary.vocab_size else b""

    def text(self, token: int) -> str:
        """Return the text of a token, with U+FFFD for a part of a character."""
        return self.of(token).decode(errors="replace")

    def distinct_text(self, token: int) -> str:
        r"""Return the text of a token, which for a part of a character has the form ``bytes:\xf0\x9f``."""
        data = self.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
