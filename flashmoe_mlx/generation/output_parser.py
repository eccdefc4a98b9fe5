"""Split a model's output into content, reasoning and tool calls while it is generated."""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import can_constrain_calls


@dataclass
class Delta:
    """The part that one or more tokens add to an answer.

    Args:
        content (str): Text for the user.
        reasoning (str): Text of thoughts.
        tool_calls (list[dict]): Complete calls, in OpenAI's form.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def __iadd__(self, other: Self) -> Self:
        """Append another delta."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.tool_calls += other.tool_calls
        return self


class OutputParser:
    """Parses the text of one answer as it arrives.

    Inside a thought nothing is a call, so a model can mention or draft one there: a thought ends at its closing marker
    only. Some models forget that marker. If an answer ends with complete calls in a thought that was never closed,
    they are returned at the end; their text is reasoning as well, and no constraint has checked it.

    Args:
        tokenizer (TokenizerWrapper, optional): mlx-lm's tokenizer, which has the model's markers of thoughts and calls.
            ``None`` parses plain text.
        stops (Sequence[str]): Texts that end the content. They have no effect inside thoughts and calls.
        in_thought (bool): The text begins inside a thought.
        tools (Sequence[dict]): Functions that may be called. Without them, a call is content.

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
    ):
        self._tokenizer = tokenizer
        self._tools = list(tools)
        if tokenizer is None:
            self._markers = TextStateMachine().make_state()
        else:
            state = tokenizer.response_initial_state or ("reasoning" if in_thought else "normal")
            self._markers = _state_machine(tokenizer).make_state(state)
        self._stops = TextStateMachine({"normal": [(stop, None) for stop in stops]}).make_state()
        self._call: str | None = None
        self._space = ""
        self.stopped = False
        self.called = False
        # Text of the current thought.
        self._thought = ""

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
                self._call = (self._call or "") + part
                continue
            self._end_call(delta, whole=True)
            if kind == "reasoning":
                delta.reasoning += part
                self._thought += part
            else:
                self._thought = ""
                self._add_content(delta, part)
        if last:
            self._end_call(delta, whole=self._tokenizer is not None and not self._tokenizer.tool_call_end)
            calls = self._calls_at_end_of_thought()
            self.called |= bool(calls)
            delta.tool_calls += calls
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

    def _end_call(self, delta: Delta, whole: bool) -> None:
        if self._call is None or self.stopped:
            return
        assert self._tokenizer is not None
        text, self._call = self._call, None
        calls = self._parse(text) if whole and self._tools else []
        # Text that is not a valid call is content, so that nothing is lost.
        if not calls:
            text = self._tokenizer.tool_call_start + text + (self._tokenizer.tool_call_end if whole else "")
            self._add_content(delta, text)
        self.called |= bool(calls)
        delta.tool_calls += calls

    def _calls_at_end_of_thought(self) -> list[dict[str, Any]]:
        """Return the calls that an unclosed thought ends with; none if any text follows or is between them."""
        if not self._thought or not self._tools or self._tokenizer is None or not self._tokenizer.tool_call_end:
            return []
        start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
        names = [tool["function"]["name"] for tool in self._tools]
        calls: list[dict[str, Any]] = []
        position = 0
        # In prose, a marker is not followed by a call.
        opening = re.compile(re.escape(start) + (r"(?=\s*[<{])" if can_constrain_calls(self._tokenizer) else ""))
        while found := opening.search(self._thought, position):
            # Text between two calls makes drafts of the earlier ones.
            if self._thought[position : found.start()].strip():
                calls = []
            text, closed, _ = self._thought[found.end() :].partition(end)
            # A marker inside a call may be an argument's, whose text must not become a call.
            if not closed or start in text:
                return []
            parsed = self._parse(text)
            valid = parsed and all(call["function"]["name"] in names for call in parsed)
            calls = [*calls, *parsed] if valid else []
            position = found.end() + len(text) + len(end)
        return [] if self._thought[position:].strip() else calls

    def _parse(self, text: str) -> list[dict[str, Any]]:
        """Return the calls in a text between the markers, in OpenAI's form; none if it cannot be parsed."""
        assert self._tokenizer is not None
        try:
            found = self._tokenizer.tool_parser(text.strip(), self._tools)
            return [_openai_call(**call) for call in (found if isinstance(found, list) else [found])]
        # Parsers raise arbitrary exceptions on malformed calls.
        except Exception:
            return []


def _state_machine(tokenizer: TokenizerWrapper) -> TextStateMachine:
    """Return mlx-lm's state machine of a model's markers, without its way from a thought into a call."""
    transitions = {"normal": [(marker, "normal") for marker in tokenizer.structural_markers]}
    if tokenizer.has_thinking:
        transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"] = [(tokenizer.think_end, "normal")]
    formats = tokenizer.response_transitions
    if tokenizer.has_tool_calling:
        # A response format that has calls says where they start.
        if not any(target == "tool" for edges in formats.values() for _, target in edges):
            transitions["normal"].append((tokenizer.tool_call_start, "tool"))
        transitions["tool"] = [(tokenizer.tool_call_end, "normal")] if tokenizer.tool_call_end else []
    for state, edges in formats.items():
        transitions.setdefault(state, []).extend(edges)
    return TextStateMachine(transitions)


def _openai_call(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False, allow_nan=False)}
    return {"id": id or f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
