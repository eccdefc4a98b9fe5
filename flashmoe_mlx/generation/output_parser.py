"""Content, thoughts and tool calls, told apart while the text arrives."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass
class Piece:
    """What some tokens add to an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class Pieces:
    """Reads the text of one answer.

    Args:
        tokenizer: mlx-lm's; it knows the marks that the model sets. ``None`` reads plain text.
        stops (Sequence[str]): texts that end the content. They mean nothing inside thoughts and calls.
        thinks (bool): the text begins inside a thought.
        tools (Sequence[dict]): what may be called. Without them, a call is content like any other.

    Attributes:
        stopped (bool): one of the stops has been met; what comes after it does not count.
        called (bool): there have been tool calls.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper | None,
        stops: Sequence[str] = (),
        thinks: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ):
        self._tokenizer = tokenizer
        self._tools = list(tools)
        if tokenizer is None:
            self._marks = TextStateMachine().make_state()
        else:
            state = tokenizer.response_initial_state or ("reasoning" if thinks else "normal")
            self._marks = make_text_state_machine(tokenizer).make_state(state)
        self._stops = TextStateMachine({"normal": [(stop, None) for stop in stops]}).make_state()
        self._call: str | None = None
        self._space = ""
        self.stopped = False
        self.called = False

    def read(self, text: str, last: bool) -> Piece:
        """What ``text`` adds. Its end may be held back until it is known what it begins, unless it is the ``last``."""
        piece = Piece()
        self._marks, parts = TextStateMachine.split(self._marks, text)
        if last:
            self._marks, rest, kind = TextStateMachine.flush(self._marks)
            parts.append((kind, rest))
        for kind, part in parts:
            if kind == "tool":
                self._call = (self._call or "") + part
                continue
            self._end_call(piece, whole=True)
            if kind == "reasoning":
                piece.reasoning += part
            else:
                self._add_content(piece, part)
        if last:
            self._end_call(piece, whole=self._tokenizer is not None and not self._tokenizer.tool_call_end)
            if not self.stopped:
                self._stops, rest, _ = TextStateMachine.flush(self._stops)
                piece.content += rest
        return piece

    def _add_content(self, piece: Piece, text: str) -> None:
        if self.stopped:
            return
        self._stops, parts = TextStateMachine.split(self._stops, text)
        self.stopped = self._stops[0] is None
        content = self._space + "".join(part for _, part in parts)
        # Space after a call is only worth telling if something follows it.
        told = content.rstrip() if self.called else content
        self._space = content[len(told) :]
        piece.content += told

    def _end_call(self, piece: Piece, whole: bool) -> None:
        if self._call is None or self.stopped:
            return
        assert self._tokenizer is not None
        text, self._call = self._call, None
        calls = self._parse(text) if whole and self._tools else []
        if not calls:  # then nothing of it is lost
            text = self._tokenizer.tool_call_start + text + (self._tokenizer.tool_call_end if whole else "")
            self._add_content(piece, text)
        self.called |= bool(calls)
        piece.tool_calls += calls

    def _parse(self, text: str) -> list[dict[str, Any]]:
        """The calls in a text between the marks, as OpenAI shapes them; none if they cannot be read."""
        assert self._tokenizer is not None
        try:
            found = self._tokenizer.tool_parser(text.strip(), self._tools)
            return [_shaped(**call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # each parser stumbles in its own way over what is no call
            return []


def _shaped(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False, allow_nan=False)}
    return {"id": id or f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
