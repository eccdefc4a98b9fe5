"""Split a model's output into content, reasoning and tool calls while it is generated."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper


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
            self._markers = make_text_state_machine(tokenizer).make_state(state)
        self._stops = TextStateMachine({"normal": [(stop, None) for stop in stops]}).make_state()
        self._call: str | None = None
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
                self._call = (self._call or "") + part
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

    def _parse(self, text: str) -> list[dict[str, Any]]:
        """Return the calls in a text between the markers, in OpenAI's form; none if it cannot be parsed."""
        assert self._tokenizer is not None
        try:
            found = self._tokenizer.tool_parser(text.strip(), self._tools)
            return [_openai_call(**call) for call in (found if isinstance(found, list) else [found])]
        # Parsers raise arbitrary exceptions on malformed calls.
        except Exception:
            return []


def _openai_call(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False, allow_nan=False)}
    return {"id": id or f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
