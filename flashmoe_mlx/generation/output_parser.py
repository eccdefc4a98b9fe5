"""Split a model's output into content, reasoning and tool calls while it is generated."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Call, read_calls
from flashmoe_mlx.generation.call_stream import CallPart, CallStream


@dataclass
class Delta:
    """The part that one or more tokens add to an answer.

    Args:
        content (str): Text for the user.
        reasoning (str): Text of thoughts.
        tool_calls (list[dict]): Complete calls, in OpenAI's form.
        call_parts (list[CallPart]): What is certain of calls that are being written.
        torn (str): Text of a call that was cut off after parts of it were certain.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    call_parts: list[CallPart] = field(default_factory=list)
    torn: str = ""

    def __iadd__(self, other: Self) -> Self:
        """Append another delta."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.tool_calls += other.tool_calls
        self.call_parts += other.call_parts
        self.torn += other.torn
        return self


class OutputParser:
    """Parses the text of one answer as it arrives.

    Args:
        tokenizer (TokenizerWrapper, optional): mlx-lm's tokenizer, which has the model's markers of thoughts and calls.
            ``None`` parses plain text.
        stops (Sequence[str]): Texts that end the content. They have no effect inside thoughts and calls.
        in_thought (bool): The text begins inside a thought.
        tools (Sequence[dict]): Functions that may be called. Without them, a call is content.
        certain (Callable): Asked when a call begins: its form is certain, because the answer is under a constraint.
            Then the parts of the call are returned as they are written.

    Attributes:
        stopped (bool): A stop text was found; all text after it is dropped.
        called (bool): There have been tool calls.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper | None,
        stops: Sequence[str] = (),
        in_thought: bool = False,
        tools: Sequence[dict[str, Any]] = (),
        certain: Callable[[], bool] = lambda: False,
    ):
        self._tokenizer = tokenizer
        self._tools = list(tools)
        if tokenizer is None:
            self._markers = TextStateMachine().make_state()
        else:
            state = tokenizer.response_initial_state or ("reasoning" if in_thought else "normal")
            self._markers = make_text_state_machine(tokenizer).make_state(state)
        self._stops = TextStateMachine({"normal": [(stop, None) for stop in stops]}).make_state()
        self._call: str | None = None
        self._certain = certain
        self._stream: CallStream | None = None
        # Text of the call that the stream has not read, because its form is not certain any more.
        self._unread = ""
        self._space = ""
        self.stopped = False
        self.called = False

    def feed(self, text: str, last: bool) -> Delta:
        """Parse the next part of the text.

        Args:
            text (str): The part.
            last (bool): The answer ends with it. Otherwise the end of the text may be held back until it is clear
                whether a marker begins there.

        Returns:
            Delta: What the part adds to the answer.
        """
        delta = Delta()
        self._markers, parts = TextStateMachine.split(self._markers, text)
        if last:
            self._markers, rest, kind = TextStateMachine.flush(self._markers)
            parts.append((kind, rest))
        for kind, part in parts:
            if kind == "tool":
                self._read_call(delta, part)
                continue
            self._end_call(delta, whole=True)
            if kind == "reasoning":
                delta.reasoning += part
            else:
                self._add_content(delta, part)
        if last:
            self._end_call(delta, whole=self._tokenizer is not None and not self._tokenizer.tool_call_end)
            if not self.stopped:
                self._stops, rest, _ = TextStateMachine.flush(self._stops)
                delta.content += rest
        return delta

    def _add_content(self, delta: Delta, text: str) -> None:
        if self.stopped:
            return
        self._stops, parts = TextStateMachine.split(self._stops, text)
        self.stopped = self._stops[0] is None
        content = self._space + "".join(part for _, part in parts)
        # White space after a call is content only if text follows it.
        shown = content.rstrip() if self.called else content
        self._space = content[len(shown) :]
        delta.content += shown

    def _read_call(self, delta: Delta, part: str) -> None:
        assert self._tokenizer is not None
        if self._call is None and self._tools and not self.stopped and self._certain():
            self._stream = CallStream(self._tools)
        self._call = (self._call or "") + part
        self._unread += part
        if self._stream is not None and self._certain():
            delta.call_parts += self._stream.feed(self._unread)
            self._unread = ""

    def _end_call(self, delta: Delta, whole: bool) -> None:
        if self._call is None or self.stopped:
            return
        assert self._tokenizer is not None
        text, self._call = self._call, None
        stream, self._stream = self._stream, None
        unread, self._unread = self._unread, ""
        calls = self._parse(text) if whole and self._tools else []
        if stream is not None and stream.begun:
            calls = stream.finish(calls, unread)
            delta.call_parts += stream.rest if calls else []
        # Text that is not a valid call is content, so that nothing is lost.
        if not calls:
            text = self._tokenizer.tool_call_start + text + (self._tokenizer.tool_call_end if whole else "")
            if stream is not None and stream.begun:
                delta.torn += text
            else:
                self._add_content(delta, text)
        self.called |= bool(calls)
        delta.tool_calls += calls

    def _parse(self, text: str) -> list[dict[str, Any]]:
        """Return the calls in a text between the markers, in OpenAI's form; none if it cannot be parsed."""
        assert self._tokenizer is not None
        try:
            return [_openai_call(call) for call in read_calls(self._tokenizer, text, self._tools)]
        except ValueError:
            return []


def _openai_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
