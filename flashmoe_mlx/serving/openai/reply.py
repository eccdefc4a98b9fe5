"""Answers in the shape of OpenAI's API, whole or as a stream of chunks."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx import __version__
from flashmoe_mlx.generation.job import Answer, Token
from flashmoe_mlx.generation.output_parser import Delta, OutputParser
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.schema import ChatRequest, Request


class Reply:
    """The reply to one request, built token by token.

    Args:
        request (Request): The request.
        answer (Answer): Yields the tokens.
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
        model (str): The model's name in the reply.
    """

    def __init__(self, request: Request, answer: Answer, tokenizer: TokenizerWrapper, model: str):
        chat = isinstance(request, ChatRequest)
        self._chat = chat
        self._answer = answer
        self._tokenizer = tokenizer
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._include_logprobs = request.logprobs not in (None, False)
        if isinstance(request, ChatRequest):
            self._parser = OutputParser(tokenizer, request.stops, answer.job.prompt.in_thought, request.offered_tools)
            self._one_call = not request.parallel_tool_calls
        else:
            self._parser = OutputParser(None, request.stops)
            self._one_call = False
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": ("chat.completion" if chat else "text_completion")
            + (".chunk" if chat and request.stream else ""),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"flashmoe_mlx-{__version__}",
        }
        self._all = Delta()
        # Added since the last chunk.
        self._new = Delta()
        self._begun = False
        # Tokens whose logprobs are not sent yet, each with the length of the text before it.
        self._unsent: list[tuple[int, Token]] = []
        self._tokens = 0
        self._text_length = 0
        self._finish_reason: str | None = None

    @property
    def finished(self) -> bool:
        """The reply is complete."""
        return self._finish_reason is not None

    def add(self, token: Token) -> None:
        """Add a token of the answer."""
        self._tokens += 1
        delta = self._parser.feed(token.text, token.finish_reason is not None)
        if token.id not in self._tokenizer.eos_token_ids:
            self._unsent.append((self._text_length, token))
        self._text_length += len(token.text)
        if self._one_call:
            delta.tool_calls = delta.tool_calls[:1]
        self._all += delta
        self._new += delta
        enough = self._parser.stopped or (self._one_call and self._parser.called)
        self._finish_reason = "stop" if enough else token.finish_reason
        if self._finish_reason == "stop" and self._parser.called:
            self._finish_reason = "tool_calls"

    def whole(self) -> dict[str, Any]:
        """Return the whole reply."""
        message: dict[str, Any] = {"role": "assistant", "content": self._all.content}
        if self._all.reasoning:
            message["reasoning"] = self._all.reasoning
        if self._all.tool_calls:
            message |= {"content": self._all.content or None, "tool_calls": self._all.tool_calls}
        content = {"message": message} if self._chat else {"text": self._all.content}
        return {**self._head, "choices": [self._choice(content)], "usage": self._usage()}

    def events(self) -> Iterator[bytes]:
        """Yield the server-sent events of all that is new, and of the end once the reply is complete."""
        if chunk := self.chunk():
            yield _event(json.dumps(chunk))
        if self.finished:
            if self._include_usage:
                yield _event(json.dumps(self.usage_chunk()))
            yield _event("[DONE]")

    def error_event(self, error: ApiError) -> bytes:
        """Return the event that ends a stream with an error."""
        return _event(json.dumps(error.content()))

    def chunk(self) -> dict[str, Any] | None:
        """Return the chunk with all that is new since the last one; ``None`` if nothing is."""
        new, self._new = self._new, Delta()
        if new == Delta() and not self.finished:
            return None
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        if new.content:
            delta["content"] = new.content
        if new.reasoning:
            delta["reasoning"] = new.reasoning
        if new.tool_calls:
            first = len(self._all.tool_calls) - len(new.tool_calls)
            delta["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(new.tool_calls)]
        self._begun = True
        return {**self._head, "choices": [self._choice({"delta": delta} if self._chat else {"text": new.content})]}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk with the token counts, which ends a stream when the client asks for it."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def _choice(self, content: dict[str, Any]) -> dict[str, Any]:
        tokens, self._unsent = self._unsent, []
        logprobs = None
        if self._include_logprobs:
            logprobs = self._chat_logprobs(tokens) if self._chat else self._text_logprobs(tokens)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": self._finish_reason}

    def _chat_logprobs(self, tokens: list[tuple[int, Token]]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._tokenizer.decode([token])
            # A token with a part of a character has no text of its own.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        return {
            "content": [
                {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top_logprobs]}
                for _, token in tokens
            ]
        }

    def _text_logprobs(self, tokens: list[tuple[int, Token]]) -> dict[str, Any]:
        decode = self._tokenizer.decode
        return {
            "tokens": [decode([token.id]) for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": [{decode([each]): logprob for each, logprob in token.top_logprobs} for _, token in tokens],
            "text_offset": [offset for offset, _ in tokens],
        }

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._answer.job.prompt.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._answer.cached_tokens},
        }


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
