"""The choice of a completion: the text that continues one prompt, and its logprobs."""

import codecs
from collections.abc import Collection
from typing import Any

from flashmoe_mlx.generation.job import Answer, Token
from flashmoe_mlx.generation.output_parser import OutputParser
from flashmoe_mlx.generation.prompt_logprobs import PromptToken
from flashmoe_mlx.serving.openai.first_spaces import FirstSpaces
from flashmoe_mlx.serving.openai.schema import CompletionRequest
from flashmoe_mlx.serving.openai.token_bytes import TokenBytes


class TextChoice:
    """One choice of a completion, built token by token.

    Args:
        index (int): Its number, which is that of its prompt.
        request (CompletionRequest): The request.
        answer (Answer): Yields the tokens.
        token_bytes (TokenBytes): The vocabulary.
        ends (Collection[int]): Tokens that end an answer.

    Attributes:
        answer (Answer): As given.
        tokens (int): How many have been generated.
        finish_reason (str, optional): Set once the choice is complete.
        warnings (list[str]): None: a completion is not constrained.
    """

    def __init__(
        self, index: int, request: CompletionRequest, answer: Answer, token_bytes: TokenBytes, ends: Collection[int]
    ):
        self.answer = answer
        self.tokens = 0
        self.finish_reason: str | None = None
        self.warnings: list[str] = []
        self._index, self._token_bytes, self._ends = index, token_bytes, ends
        self._parser = OutputParser(None, request.stops)
        self._logprobs, self._top_logprobs = request.logprobs is not None, bool(request.logprobs)
        self._all, self._new = "", ""
        # Tokens whose logprobs are not sent yet, each with its place in the text.
        self._unsent: list[tuple[int, Token | PromptToken]] = []
        self._characters, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces = FirstSpaces(token_bytes, ends)
        self._echoed = not request.echo
        prompt = request.prompts()[index]
        self._prompt = prompt if isinstance(prompt, str) else None
        self._sent = False

    def add(self, token: Token) -> None:
        """Add a token of the answer."""
        self._echo()
        self.tokens += 1
        last = token.finish_reason is not None
        text = self._parser.feed(self._spaces.text(token, last), last).content
        self._all += text
        self._new += text
        # The token that ends the text is no part of it, but it has a logprob.
        self._add_logprobs(token, b"" if token.id in self._ends else self._token_bytes.of(token.id))
        self.finish_reason = "stop" if self._parser.stopped else token.finish_reason

    def end(self) -> None:
        """Complete the choice after the last token, of which there is none if the request asks for none."""
        self._echo()
        self.finish_reason = self.finish_reason or "length"

    def start(self) -> dict[str, Any] | None:
        """Return what a stream begins with: nothing."""
        return None

    def chunk(self) -> dict[str, Any] | None:
        """Return all that is new since the last chunk; ``None`` if nothing is."""
        if self._sent or not (self._new or self.finish_reason):
            return None
        self._sent = self.finish_reason is not None
        text, self._new = self._new, ""
        return self._choice(text)

    def whole(self) -> dict[str, Any]:
        """Return the whole choice."""
        return self._choice(self._all)

    def _choice(self, text: str) -> dict[str, Any]:
        logprobs = self._take_logprobs() if self._logprobs else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _echo(self) -> None:
        """Begin with the prompt, once its logprobs are known."""
        if self._echoed:
            return
        self._echoed = True
        ids = self.answer.job.prompt.tokens
        decoded = b"".join(map(self._token_bytes.of, ids)).decode(errors="replace")
        text = decoded if self._prompt is None else self._prompt
        # A tokenizer may add a token or a space at the start, which are not in the text.
        self._characters = len(text) - len(decoded)
        for token in self.answer.prompt_logprobs:
            self._add_logprobs(token, self._token_bytes.of(token.id))
        self._characters, self._decoder = len(text), codecs.getincrementaldecoder("utf-8")("replace")
        self._all += text
        self._new += text

    def _add_logprobs(self, token: Token | PromptToken, data: bytes) -> None:
        if self._logprobs:
            self._unsent.append((max(0, self._characters), token))
            self._characters += len(self._decoder.decode(data))

    def _take_logprobs(self) -> dict[str, Any]:
        unsent, self._unsent = self._unsent, []
        text = self._token_bytes.distinct_text
        tops = [
            None if token.logprob is None else {text(each): logprob for each, logprob in token.top_logprobs}
            for _, token in unsent
        ]
        return {
            "tokens": [text(token.id) for _, token in unsent],
            "token_logprobs": [token.logprob for _, token in unsent],
            "top_logprobs": tops if self._top_logprobs else None,
            "text_offset": [offset for offset, _ in unsent],
        }
