"""Answers in the shape of OpenAI's API, whole or as a stream of chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx import __version__
from flashmoe_mlx.generation.job import Answer
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.chat_choice import ChatChoice
from flashmoe_mlx.serving.openai.schema import ChatRequest, Request
from flashmoe_mlx.serving.openai.text_choice import TextChoice
from flashmoe_mlx.serving.openai.token_bytes import TokenBytes

Choice = ChatChoice | TextChoice


class Reply:
    """The reply to one request. Its choices are completed one after the other.

    Args:
        request (Request): The request.
        answers (Sequence[Answer]): One for each prompt.
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
        vocabulary (LLTokenizer): From :func:`flashmoe_mlx.constrain.vocabulary_of`.
        model (str): The model's name in the reply.

    Attributes:
        choices (list): The choices.
    """

    def __init__(
        self, request: Request, answers: Sequence[Answer], tokenizer: TokenizerWrapper, vocabulary: Any, model: str
    ):
        token_bytes = TokenBytes(vocabulary)
        self.choices: list[Choice]
        if isinstance(request, ChatRequest):
            self.choices = [ChatChoice(request, answer, token_bytes, tokenizer) for answer in answers]
            prefix, kind = "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion"
        else:
            ends = tokenizer.eos_token_ids
            self.choices = [
                TextChoice(index, request, answer, token_bytes, ends) for index, answer in enumerate(answers)
            ]
            prefix, kind = "cmpl", "text_completion"
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"flashmoe_mlx-{__version__}",
        }

    def whole(self) -> dict[str, Any]:
        """Return the whole reply."""
        choices = [choice.whole() for choice in self.choices]
        warnings = [line for choice in self.choices for line in choice.warnings]
        return self._with_warnings({**self._head, "choices": choices, "usage": self._usage()}, warnings)

    def start_events(self) -> bytes:
        """Return the events that a stream begins with, before any token."""
        return b"".join(self._chunk_event(start) for choice in self.choices if (start := choice.start()))

    def events(self, choice: Choice) -> bytes:
        """Return the event of all that is new in a choice; nothing if nothing is."""
        chunk = choice.chunk()
        return b"" if chunk is None else self._chunk_event(chunk, choice.warnings if choice.finish_reason else ())

    def end_events(self) -> bytes:
        """Return the events that end a stream."""
        usage = _event(json.dumps({**self._head, "choices": [], "usage": self._usage()}))
        return (usage if self._include_usage else b"") + _event("[DONE]")

    def error_event(self, error: ApiError) -> bytes:
        """Return the event that ends a stream with an error."""
        return _event(json.dumps(error.content()))

    def _chunk_event(self, choice: dict[str, Any], warnings: Sequence[str] = ()) -> bytes:
        return _event(json.dumps(self._with_warnings({**self._head, "choices": [choice]}, warnings)))

    def _with_warnings(self, content: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
        return content | ({"warnings": list(warnings)} if warnings else {})

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(choice.answer.job.prompt.tokens) for choice in self.choices)
        completion = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.answer.cached_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
