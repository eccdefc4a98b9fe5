"""One parameter of an XML-style call: the values that may be written, and their meaning."""

import ast
import functools
import json
import re
from typing import Any

import msgspec

from flashmoe_mlx.constrain.alternatives import alternatives
from flashmoe_mlx.constrain.call import whole_characters
from flashmoe_mlx.constrain.keywords import APART, TOGETHER
from flashmoe_mlx.constrain.lark import quote
from flashmoe_mlx.constrain.pattern import FORMATS, whole_text
from flashmoe_mlx.constrain.schema import Schema, fault_of, json_value

END = "\n</parameter>\n"
"""The end of a value."""

# Texts without an end of a value, which they could also form together with the one that follows them.
_WHOLE = r"~/(?s:.*\n<\/parameter>(?:\n.*)?)/"
_TAG = re.compile(r"<(\\*)/(parameter|tool_call)>")
# Beyond, a pattern and a counter take seconds.
_LEAST_WITH_PATTERN = 2000
_NUMBER = "-?(?:0|[1-9][0-9]*)(?:\\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_ANYTHING = {"null", "boolean", "number", "string", "array", "object"}
_FIRST = {"[": "array", "{": "object", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}


def escape(text: str) -> str:
    r"""Return a text as it is written in a call: closing tags have a backslash, ``<\/parameter>``."""
    return _TAG.sub(r"<\\\1/\2>", text)


def unescape(text: str) -> str:
    """Undo :func:`escape`."""
    return _TAG.sub(lambda found: f"<{found[1][1:]}/{found[2]}>", text)


class Parameter:
    r"""A parameter.

    Texts are written without quotes. Other values are written as JSON; of a parameter that may be text, they are told
    from text by their form. Without any rule for its type, a parameter is a text, unless it is an object, a list, or
    null.

    Args:
        key (str): Its name.
        schema (dict or bool): Its clean schema.
        definitions (dict): The schemas that references point to.
    """

    def __init__(self, key: str, schema: Any, definitions: Schema):
        self._key, self._schema, self._definitions = key, schema, definitions
        choices = alternatives(schema, definitions)
        self._constants = [value for choice in choices for value in choice.get("enum", ())]
        self._typed = [choice for choice in choices if "enum" not in choice]
        types = {choice["type"] for choice in self._typed}
        # The types that are told from text by their form.
        self._told = types - ({"string", "boolean", "number"} if types >= _ANYTHING else {"string"})
        # A value of these types must fit rules, so no text may look like one.
        self._ruled = self._told & {choice["type"] for choice in self._typed if len(choice) > 1}
        self._may_be_text = "string" in types or any(isinstance(value, str) for value in self._constants)

    @property
    def is_writable(self) -> bool:
        """There is a value for it, and its name can be written."""
        return re.fullmatch(r"[^<>\n]+", self._key) is not None and bool(self._values)

    def faults(self) -> list[str]:
        """Return what of the schema is not held, beyond what cleaning has found."""
        patterns = sorted({choice["pattern"] for choice in self._typed if "pattern" in choice})
        return [
            f"the pattern {pattern[:80]!r} is not enforced: it cannot be used without quotes"
            for pattern in patterns
            if self._may_be_text and _usable(pattern) is None
        ]

    def rules(self, name: str) -> list[str]:
        """Return the rule of this name, and the ones that it refers to."""
        names = [f"{name}_{number}" for number in range(len(self._values))]
        rules = [f"{each}{value}" for each, value in zip(names, self._values, strict=True)]
        return [f"{name}: {quote(f'<parameter={self._key}>' + chr(10))} ({' | '.join(names)})", *rules]

    def read(self, text: str) -> str:
        """Return the JSON of a value, with the digits that the model wrote."""
        plain = json.dumps(unescape(text), ensure_ascii=False)
        if not self._may_be_text:
            return _json_of(text) or _lenient_json_of(text) or plain
        if unescape(text) in (value for value in self._constants if isinstance(value, str)):
            return plain
        if text in (json.dumps(value) for value in self._constants):
            return text
        value = _json_of(text)
        return value if value is not None and _types_of_json(value) & self._told else plain

    def is_surely_text(self, start: str) -> bool:
        """Say whether a value that begins in this way is a text, whatever follows."""
        if not self._may_be_text or any(json.dumps(value).startswith(start) for value in self._constants):
            return False
        words = [word for word in ("null", "true", "false") if _FIRST[word[0]] in self._told]
        if any(word.startswith(start.strip()) for word in words):
            return False
        if self._told & {"integer", "number"} and re.fullmatch(r"\s*[-+.0-9eE]*\s*", start):
            return False
        first, brackets = start.lstrip()[:1], self._told & {"array", "object"}
        return not brackets or (first != "" and _FIRST.get(first) not in brackets)

    @functools.cached_property
    def _values(self) -> list[str]:
        """The rules of the values, without their names."""
        end, found = quote(END), []
        if self._may_be_text:
            constants = [escape(each) if isinstance(each, str) else json.dumps(each) for each in self._constants]
            found += [f": {quote(text)} {end}" for text in dict.fromkeys(constants)]
            texts = [choice for choice in self._typed if choice["type"] == "string"]
            # A text goes on to the first end of a value.
            found += [f"[suffix={end}]: {self._text(choice)}" for choice in texts]
            others = [choice for choice in self._typed if choice["type"] in self._told]
            # A text without rules may be any of them.
            if others and (self._ruled or {"type": "string"} not in texts):
                found.append(f": {json_value({'anyOf': others}, self._definitions)} {end}")
        elif self._schema is not False:
            found.append(f": {json_value(self._schema, self._definitions)} {end}")
        # llguidance refuses a rule that no value fits.
        return [value for value in found if not fault_of(f"start: x\nx{value}\n")]

    def _text(self, schema: Schema) -> str:
        """Return a term for a text that is not read as something else."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        apart = schema.get(APART, {}).get("minLength", 0)
        rules = []
        if "pattern" in schema and (pattern := _usable(schema["pattern"])):
            rules.append(f"/{pattern}/")
        if schema.get("format") in FORMATS:
            rules.append(f"/{FORMATS[schema['format']]}/")
        # A pattern may forbid the line break that the end begins with, so it must know when the text may end.
        if rules and apart <= _LEAST_WITH_PATTERN:
            least = max(least, apart)
        # An escape has one character more than its text. A grammar for a length alone is intersected with this one.
        if rules or apart or 0 < least <= TOGETHER:
            rules.append(r"~/(?s:.*<\\+\/(?:parameter|tool_call)>.*)/")
        starts = ("\\[" if "array" in self._ruled else "") + ("{" if "object" in self._ruled else "")
        if starts:
            rules.append(f"~/(?s:[ \\t\\r\\n]*[{starts}].*)/")
        if self._ruled & {"integer", "number"}:
            rules.append(f"~/[ \\t\\r\\n]*{_NUMBER}[ \\t\\r\\n]*/")
        # The reader takes the first end of a value for the end, even if the text does not fit yet.
        rules += [_WHOLE] if rules or least else []
        return f"({' & '.join([f'/(?s:.{{{least},{most}}})/', *rules])})"


@functools.lru_cache(maxsize=4096)
def _usable(pattern: str) -> str | None:
    """Return a pattern for the whole text that llguidance accepts, or ``None``."""
    whole = whole_text(pattern)
    return None if whole is None or fault_of(f"start: X\nX: /{whole}/\n") else whole


def _json_of(text: str) -> str | None:
    """Return a text if it is JSON."""
    try:
        msgspec.json.decode(text.strip().encode(), type=msgspec.Raw)
        json.loads(text, parse_int=str, parse_float=str, parse_constant=int)
    except (ValueError, RecursionError):
        return None
    return whole_characters(text.strip())


def _lenient_json_of(text: str) -> str | None:
    """Return the JSON of what is almost JSON: with line breaks in strings, or in Python's spelling."""
    if text.lower() in ("true", "false", "null"):
        return text.lower()
    try:
        value = json.loads(text, strict=False, parse_int=_raw, parse_float=_raw, parse_constant=int)
        return msgspec.json.encode(value).decode()
    except (ValueError, RecursionError):
        pass
    try:
        return json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _raw(number: str) -> msgspec.Raw:
    return msgspec.Raw(number.encode())


def _types_of_json(text: str) -> set[str]:
    if text[0] in '[{"tfn':
        return {_FIRST[text[0]]}
    return {"number"} if re.search(r"[.eE]", text) else {"number", "integer"}
