"""Reads a tool call while it is written: its name, then its arguments as pieces of JSON.

Only for calls under a constraint, whose form is certain from the opening tag on: Hermes' JSON style, Qwen's XML style.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Parser = Callable[[str, list[Any]], Any]
"""One of mlx-lm's parsers of tool calls."""

_JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_XML_HEAD = re.compile(r"\s*<function=([^\s<>]+)>\n?")
_XML_PARAMETER = re.compile(r"\s*<parameter=([^\s<>]+)>\n")
_XML_END = re.compile(r"\s*</function>")
_CLOSERS = ("\n</parameter>", "</parameter>")
# The parser reads this text as null, in any case and of any type.
_NULL = "null"


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
        parser (Callable): mlx-lm's parser of the model's calls.
        tools (Sequence[dict]): The tools, as the parser takes them.

    Attributes:
        arguments (str): The arguments as far as they are certain.
        complete (bool): The arguments are whole.
        rest (list[CallPart]): Set by :meth:`finish`.
    """

    def __init__(self, parser: Parser, tools: Sequence[Mapping[str, Any]]):
        self._id = f"call_{uuid.uuid4().hex}"
        self._name = ""
        self._parser, self._tools = parser, tools
        self._buffer = ""
        self._step: Callable[[], str | None] = self._head
        self._key = ""
        self._parameters = 0
        # Of JSON: how many brackets are open, and whether the text is inside a string or after a backslash there.
        self._depth, self._in_string, self._escaped = 0, False, False
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
            calls (Sequence[dict]): What the parser of whole calls read, in OpenAI's form.
            unread (str): Text that :meth:`feed` has not read.

        Returns:
            list[dict]: The call, in OpenAI's form; none if what is certain so far does not become a valid call.
        """
        if len(calls) != 1 or not self.begun:
            return []
        self.rest = self.feed(unread)
        whole = calls[0]["function"]["arguments"]
        # The parser of whole calls may know more forms than this one.
        if not self.complete and whole.startswith(self.arguments):
            self.rest.append(CallPart(self._id, "", whole[len(self.arguments) :]))
            self.arguments, self.complete = whole, True
        if not self.complete or not _is_object(self.arguments):
            return []
        return [{"id": self._id, "type": "function", "function": {"name": self._name, "arguments": self.arguments}}]

    # Each step takes what it understands from the buffer and returns JSON text, or None to wait for more.

    def _head(self) -> str | None:
        if found := _JSON_HEAD.match(self._buffer):
            self._name, self._step = json.loads(found[1]), self._json
        elif (found := _XML_HEAD.match(self._buffer)) and found.end() < len(self._buffer):
            self._name, self._step = found[1], self._between
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
                    return self._end(self._buffer[: position + 1])
        piece, self._buffer = self._buffer, ""
        return piece or None

    def _between(self) -> str | None:
        if found := _XML_PARAMETER.match(self._buffer):
            self._key, self._buffer = found[1], self._buffer[found.end() :]
            before = ", " if self._parameters else "{"
            self._parameters += 1
            self._step = self._text_begin if self._is_text() else self._value
            return f"{before}{json.dumps(self._key, ensure_ascii=False)}: "
        if _XML_END.match(self._buffer):
            return self._end("}" if self._parameters else "{}")
        return None

    def _text_begin(self) -> str | None:
        """Wait until a text can no longer be the one that is read as null."""
        text, closed = self._until_closer()
        if not closed and _NULL.startswith(text.lower()):
            return None
        if closed and text.lower() == _NULL:
            return self._value()
        self._step = self._text
        return '"'

    def _text(self) -> str | None:
        text, closed = self._until_closer()
        self._buffer = self._buffer[len(text) :]
        if closed:
            self._close()
            return f'{_escaped(text)}"'
        return _escaped(text) or None

    def _value(self) -> str | None:
        """Wait for a whole value that is not simply text."""
        text, closed = self._until_closer()
        if not closed:
            return None
        self._buffer = self._buffer[len(text) :]
        self._close()
        return self._as_json(text)

    def _until_closer(self) -> tuple[str, bool]:
        """Return the part of the buffer that belongs to the value, and whether the closing tag follows."""
        start = self._buffer.find(_CLOSERS[1])
        if start >= 0:
            return self._buffer[:start].removesuffix("\n"), True
        for length in range(min(len(_CLOSERS[0]), len(self._buffer)), 0, -1):
            end = self._buffer[-length:]
            if any(closer.startswith(end) for closer in _CLOSERS):
                return self._buffer[:-length], False
        return self._buffer, False

    def _close(self) -> None:
        self._buffer = self._buffer.removeprefix("\n").removeprefix(_CLOSERS[1])
        self._step = self._between

    def _end(self, piece: str) -> str:
        self.complete = True
        self._buffer = ""
        self._step = lambda: None
        return piece

    def _parameter(self) -> Mapping[str, Any]:
        for tool in self._tools:
            if tool["function"]["name"] == self._name:
                properties = (tool["function"].get("parameters") or {}).get("properties") or {}
                parameter = properties.get(self._key)
                return parameter if isinstance(parameter, Mapping) else {}
        return {}

    def _is_text(self) -> bool:
        parameter = self._parameter()
        return not parameter or parameter.get("type") == "string"

    def _as_json(self, text: str) -> str | None:
        """Return a value as JSON: as it was written where that is JSON, else as the parser reads it."""
        try:
            written = json.loads(text, parse_constant=_refuse)
        except ValueError:
            written = text
        # Without a type, only objects and arrays are told from text.
        if isinstance(written, dict | list) or ("type" in self._parameter() and not isinstance(written, str)):
            return text.strip()
        call = f"<function={self._name}>\n<parameter={self._key}>\n{text}\n</parameter>\n</function>"
        try:
            value = self._parser(call, list(self._tools))["arguments"][self._key]
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Parsers raise arbitrary exceptions on malformed calls. Nothing after this value is certain.
        except Exception:
            self._step = lambda: None
            return None


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except ValueError:
        return False


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
