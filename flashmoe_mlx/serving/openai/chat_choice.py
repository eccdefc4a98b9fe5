"""The choice of a chat: content, thoughts, calls, and their logprobs."""

import logging
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Constraint, validate_call
from flashmoe_mlx.generation.call_stream import CallPart
from flashmoe_mlx.generation.job import Answer, Token
from flashmoe_mlx.generation.output_parser import Delta, OutputParser
from flashmoe_mlx.serving.openai.first_spaces import FirstSpaces
from flashmoe_mlx.serving.openai.schema import ChatRequest, NamedTool
from flashmoe_mlx.serving.openai.token_bytes import TokenBytes


class ChatChoice:
    """The one choice of a chat completion, built token by token.

    Args:
        request (ChatRequest): The request.
        answer (Answer): Yields the tokens.
        token_bytes (TokenBytes): The vocabulary.
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.

    Attributes:
        answer (Answer): As given.
        tokens (int): How many have been generated.
        finish_reason (str, optional): Set once the choice is complete.
    """

    def __init__(self, request: ChatRequest, answer: Answer, token_bytes: TokenBytes, tokenizer: TokenizerWrapper):
        self.answer = answer
        self.tokens = 0
        self.finish_reason: str | None = None
        self._token_bytes, self._ends = token_bytes, tokenizer.eos_token_ids
        self._tools = request.offered_tools
        self._constraint = next((each for each in answer.job.constraints if isinstance(each, Constraint)), None)
        self._known_warnings = len(self._constraint.warnings) if self._constraint else 0
        self._faults: list[str] = []
        self._parser = OutputParser(
            tokenizer, request.stops, answer.job.prompt.in_thought, self._tools, certain=self._is_held
        )
        self._one_call = not request.parallel_tool_calls or isinstance(request.tool_choice, NamedTool)
        self._logprobs = request.logprobs
        self._spaces = FirstSpaces(token_bytes, self._ends) if request.continues else None
        self._all = Delta()
        # Added since the last chunk.
        self._new = Delta()
        # Ids of the calls that were certain while they were written.
        self._streamed: set[str] = set()
        # Numbers of the calls in a stream, by their ids.
        self._numbers: dict[str, int] = {}
        # Tokens whose logprobs are not sent yet.
        self._unsent: list[Token] = []
        self._sent = False

    @property
    def warnings(self) -> list[str]:
        """Return one line for each part of a schema that was not enforced, and for each fault of a call."""
        return [*(self._constraint.warnings if self._constraint else []), *self._faults]

    def add(self, token: Token) -> None:
        """Add a token of the answer."""
        self.tokens += 1
        last = token.finish_reason is not None
        text = token.text if self._spaces is None else self._spaces.text(token, last)
        delta = self._parser.feed(text, last)
        if token.id not in self._ends:
            self._unsent.append(token)
        for each in (self._all, self._new):
            each += delta
        if self._one_call:
            self._all.tool_calls = self._all.tool_calls[:1]
        self._streamed |= {part.id for part in delta.call_parts}
        # No constraint holds calls at the end of an open thought, and those of unknown formats.
        self._add_faults([call for call in delta.tool_calls if self.warnings or call["id"] not in self._streamed])
        enough = self._parser.stopped or (self._one_call and self._parser.called)
        self.finish_reason = "stop" if enough else token.finish_reason
        if self.finish_reason == "stop" and self._parser.called:
            self.finish_reason = "tool_calls"

    def end(self) -> None:
        """Complete the choice after the last token."""
        self.finish_reason = self.finish_reason or "length"

    def start(self) -> dict[str, Any]:
        """Return what a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self) -> dict[str, Any] | None:
        """Return all that is new since the last chunk; ``None`` if nothing is."""
        if self._sent:
            return None
        self._sent = self.finish_reason is not None
        new, self._new = self._new, Delta()
        delta: dict[str, Any] = {}
        if new.content:
            delta["content"] = new.content
        if new.reasoning:
            delta["reasoning"] = new.reasoning
        if calls := self._call_deltas(new):
            delta["tool_calls"] = calls
        if not delta and self.finish_reason is None:
            return None
        return self._choice({"delta": delta})

    def whole(self) -> dict[str, Any]:
        """Return the whole choice."""
        content = self._all.content + self._all.torn
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._all.reasoning:
            message["reasoning"] = self._all.reasoning
        if self._all.tool_calls:
            message |= {"content": content or None, "tool_calls": self._all.tool_calls}
        return self._choice({"message": message})

    def _add_faults(self, calls: list[dict[str, Any]]) -> None:
        """Check calls that their constraint may not have held to their schemas."""
        for call in calls:
            if (fault := validate_call(call, self._tools)) is not None:
                self._faults.append(fault)
                logging.warning("a call does not fit its schema: %s", ascii(fault)[1:-1])

    def _is_held(self) -> bool:
        """Say whether calls are under a constraint that has not been released."""
        return self._constraint is not None and len(self._constraint.warnings) == self._known_warnings

    def _call_deltas(self, new: Delta) -> list[dict[str, Any]]:
        """Return the new parts of calls as OpenAI streams them: id and name first, then pieces of the arguments."""
        parts = list(new.call_parts)
        begun = {*self._numbers, *(part.id for part in parts)}
        # Calls that were not certain come whole.
        for call in new.tool_calls:
            if call["id"] not in begun:
                parts.append(CallPart(call["id"], call["function"]["name"], call["function"]["arguments"]))
        deltas: dict[int, dict[str, Any]] = {}
        for part in parts:
            number = self._numbers.setdefault(part.id, len(self._numbers))
            if self._one_call and number:
                continue
            delta = deltas.setdefault(number, {"index": number, "function": {"arguments": ""}})
            if part.name:
                delta |= {"id": part.id, "type": "function"}
                delta["function"]["name"] = part.name
            delta["function"]["arguments"] += part.arguments
        return list(deltas.values())

    def _choice(self, content: dict[str, Any]) -> dict[str, Any]:
        tokens, self._unsent = self._unsent, []
        logprobs = {"content": [self._token_logprobs(token) for token in tokens]} if self._logprobs else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _token_logprobs(self, token: Token) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self._token_bytes.of(token)
            return {"token": self._token_bytes.text(token), "logprob": logprob, "bytes": list(data)}

        return {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top_logprobs]}
