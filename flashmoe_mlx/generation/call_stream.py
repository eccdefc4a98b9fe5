"""Reads a tool call while it is written: its name, then its arguments as pieces of JSON.

Only for calls under a constraint, whose form is certain from the opening tag on: Hermes' JSON style, Qwen's XML style.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.constrain.call import whole_characters
from flashmoe_mlx.constrain.parameter import END, Parameter, unescape
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import parameters_named

_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
# JSON up to an escape that is not complete, or that the next one may complete.
_JSON_WHOLE = re.compile(
    r"(?:[^\\]+|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}"
    r"(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{2})))*"
)
_XML_HEAD = re.compile(r"\s*<function=([^>\n]*)>\n")
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n")
_XML_END = re.compile(r"\s*</function>")
# What may become an escaped closing tag, at the end of a text.
_OPEN_TAG = re.compile(r"<\\*(?:/[a-z_]{0,9})?\Z")


@dataclass(frozen=True)
class CallPart:
    """A part of a call.

    Args:
        id (str): The id of the call.
        name (str): Name of the function in the first part of a call, empty in the others.
        arguments (str): The next piece of the arguments, as JSON text.
    """

    id: str
    name: str
    arguments: str


class CallStream:
    """Reads the text of one call between its tags as it arrives.

    Args:
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.

    Attributes:
        arguments (str): The arguments as far as they are certain.
        complete (bool): The arguments are whole.
        rest (list[CallPart]): Set by :meth:`finish`.
    """

    def __init__(self, tools: Sequence[Schema]):
        self._id = f"call_{uuid.uuid4().hex}"
        self._name = ""
        self._tools = tools
        self._buffer = ""
        self._step: Callable[[], str | None] = self._head
        # Of XML: the parameters by name, the current one, and how many there have been.
        self._parameters: Mapping[str, Parameter] = {}
        self._parameter = Parameter("", {}, {})
        self._count = 0
        # Of JSON: how many brackets are open, and whether the text is inside a string or after a backslash there.
        self._depth, self._in_string, self._escaped = 0, False, False
        self._held = ""
        self.arguments = ""
        self.complete = False
        self.rest: list[CallPart] = []

    @property
    def begun(self) -> bool:
        """The name of the function is known."""
        return bool(self._name)

    def feed(self, text: str) -> list[CallPart]:
        """Read the next part of the text.

        Returns:
            list[CallPart]: What is new and certain: nothing or one part.
        """
        begun = self.begun
        self._buffer += text
        piece = ""
        while (step := self._step()) is not None:
            piece += step
        self.arguments += piece
        if not piece and begun == self.begun:
            return []
        return [CallPart(self._id, "" if begun else self._name, piece)]

    def finish(self, calls: Sequence[Mapping[str, Any]], unread: str) -> list[dict[str, Any]]:
        """Read the end of the call, and set ``rest`` to the parts that it adds.

        Args:
            calls (Sequence[dict]): What the reader of whole calls found, in OpenAI's form.
            unread (str): Text that :meth:`feed` has not read.

        Returns:
            list[dict]: The call, in OpenAI's form; none if what is certain so far does not become a valid call.
        """
        self.rest = self.feed(unread)
        whole = calls[0]["function"]["arguments"] if len(calls) == 1 else None
        # The reader of whole calls knows more forms than this one.
        if self.begun and not self.complete and whole is not None and whole.startswith(self.arguments):
            self.rest.append(CallPart(self._id, "", whole[len(self.arguments) :]))
            self.arguments, self.complete = whole, True
        if not self.complete or not _is_object(self.arguments):
            return []
        return [{"id": self._id, "type": "function", "function": {"name": self._name, "arguments": self.arguments}}]

    # Each step takes what it understands from the buffer and returns JSON text, or None to wait for more.

    def _head(self) -> str | None:
        if found := _JSON_HEAD.match(self._buffer):
            self._name, self._step = json.loads(found[1]), self._json
        elif found := _XML_HEAD.match(self._buffer):
            self._name, self._step = found[1].strip(), self._between
            self._parameters = parameters_named(self._name, self._tools)
        else:
            return None
        self._buffer = self._buffer[found.end() :]
        return ""

    def _json(self) -> str | None:
        for position, character in enumerate(self._buffer):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._end(whole_characters(self._held + self._buffer[: position + 1]))
        text, self._buffer = self._held + self._buffer, ""
        whole = _JSON_WHOLE.match(text)
        end = 0 if whole is None else whole.end()
        self._held = text[end:]
        return whole_characters(text[:end]) or None

    def _between(self) -> str | None:
        if found := _XML_PARAMETER.match(self._buffer):
            key, self._buffer = found[1], self._buffer[found.end() :]
            self._parameter = self._parameters.get(key) or Parameter(key, {}, {})
            self._step = self._value
            self._count += 1
            return f"{'{' if self._count == 1 else ', '}{json.dumps(key, ensure_ascii=False)}: "
        if _XML_END.match(self._buffer):
            return self._end("}" if self._count else "{}")
        return None

    def _value(self) -> str | None:
        """Wait for the whole value, or until it can only be a text."""
        text, closed = self._until_end()
        if closed:
            self._close(text)
            return self._parameter.read(text)
        if not self._parameter.is_surely_text(text):
            return None
        self._step = self._text
        return '"'

    def _text(self) -> str | None:
        text, closed = self._until_end()
        if closed:
            self._close(text)
            return f'{_inside_quotes(text)}"'
        if found := _OPEN_TAG.search(text):
            text = text[: found.start()]
        self._buffer = self._buffer[len(text) :]
        return _inside_quotes(text) or None

    def _until_end(self) -> tuple[str, bool]:
        """Return the part of the buffer that belongs to the value, and whether the end of the value follows."""
        start = self._buffer.find(END)
        if start >= 0:
            return self._buffer[:start], True
        for length in range(min(len(END), len(self._buffer)), 0, -1):
            if self._buffer.endswith(END[:length]):
                return self._buffer[:-length], False
        return self._buffer, False

    def _close(self, value: str) -> None:
        self._buffer = self._buffer[len(value) + len(END) :]
        self._step = self._between

    def _end(self, piece: str) -> str:
        self.complete = True
        self._buffer = ""
        self._step = lambda: None
        return piece


def _inside_quotes(text: str) -> str:
    return json.dumps(unescape(text), ensure_ascii=False)[1:-1]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
