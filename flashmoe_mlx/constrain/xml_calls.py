"""Grammars of tool calls, in llguidance's dialect of Lark: calls that mlx-lm's parser reads back as they were meant.

The parser of Qwen's XML-style calls turns the text of a parameter into a value by the ``type`` of its schema. What it
would get wrong, such as the string "null", cannot be written under these grammars.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmoe_mlx.constrain.json_calls import _EXACT, _NOT_INFINITE, _definitions, _grammar, _without, json_value, quote
from flashmoe_mlx.constrain.schema import Schema, _alternatives, _parameters, _type, _whole

Parser = Callable[[str, list[Any]], Any]

_CLOSER = "</parameter>"
_END_OF_VALUE = f"\n{_CLOSER}\n"
_MOST_PARAMETERS = 64  # llguidance counts in so many bits which of them have been written

_DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"[1-9][0-9]{{3}}-{_DAY}"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {  # every text of these is one of the format; some rare ones, such as the 29th of February, are left out
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": "[A-Za-z0-9_+-]+(?:\\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\\.[A-Za-z0-9]+)+",
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
}


def xml_calls(functions: Sequence[Schema], end: str, closing: str, parser: Parser) -> list[str]:
    """Grammars of calls in Qwen's XML style, from the opening tag on; a call keeps to all of them.

    Parameters come in any order. Numbers stay within 2**53, where the parser is exact.

    Args:
        functions: what may be called, as in OpenAI's API.
        end: the closing tag.
        closing: the same in the grammar.
        parser: mlx-lm's, which will read the call with :func:`readable` tools.

    Raises:
        ValueError: a schema is not supported.
    """
    rules = []
    for index, function in enumerate(functions):
        name, schema = function["name"], _parameters(function)
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        if len(properties) > _MOST_PARAMETERS:
            raise ValueError(f"{name}: {len(properties)} parameters, and {_MOST_PARAMETERS} are possible.")
        keys = sorted(properties, key=lambda key: key not in required)  # those that must come are counted first
        head, tail = quote(f"\n<function={name}>\n"), quote("</function>\n")
        if not keys:
            rules.append(f"call_{index}: {head} {tail}")
            continue
        rest = f"rest_{index}"
        ways = [f"{tail} %if is_ones([0:{len(required)}])" if required else tail]
        for number, key in enumerate(keys):
            rule = f"parameter_{index}_{number}"
            ways.append(f"{rule} {rest}::set_bit({number}) %if bit_clear({number})")
            rules += _Parameter(f"{name}.{key}", key, properties[key], schema, end, parser).rules(rule)
        rules += [f"call_{index}: {head} {rest}::0x0", f"{rest}::_: {' | '.join(ways)}"]
    grammar = _grammar(functions, closing, rules)
    if "%json" not in grammar:
        return [grammar]
    # A string inside an object or array may not hold a closing tag either.
    value = f"(/(?s:.*)/ & {_without(_CLOSER)} & {_without(end)} & {_NOT_INFINITE})"
    envelope = f"""start: HEAD PARAMETER* {quote("</function>" + chr(10))} {closing}
HEAD: /\\n<function=[^>]*>\\n/
PARAMETER: /<parameter=[^>]*>\\n/ {value} {quote(_END_OF_VALUE)}
"""
    return [grammar, envelope]


def readable(tools: Sequence[Schema]) -> list[dict[str, Any]]:
    """The tools as mlx-lm's parser of XML-style calls must be given them, to read each value as what it was meant as.

    The parser knows a value's type by ``type`` alone; an optional integer, for example, must say that it is an integer.
    Tools that it cannot read are left as they are.
    """
    return [{**tool, "function": _readable(tool["function"])} for tool in tools]


class _Parameter:
    """What may be written for one parameter of an XML-style call."""

    def __init__(self, where: str, key: str, schema: Schema, root: Schema, end: str, parser: Parser):
        if not all(re.fullmatch(r"[^\s<>]+", word) for word in where.rsplit(".", 1)):
            raise ValueError(f"{where}: names with spaces, < or > are not supported in this model's calls.")
        self._where, self._key, self._root, self._end, self._parser = where, key, root, end, parser
        self._choices = _alternatives(schema, root, where)
        self._type = _type(self._choices)

    def rules(self, name: str) -> list[str]:
        """The rule of this name, and those that it needs."""
        values = [value for choice in self._choices if (value := self._value(choice)) is not None]
        if not values:
            raise ValueError(f"{self._where}: mlx-lm's parser reads no value of these types in this model's calls.")
        rules, names = [], []
        for number, value in enumerate(values):
            terminal = not value.startswith("%json")
            names.append(f"{name}_{number}".upper() if terminal else f"{name}_{number}")
            rules.append(f"{names[-1]}: {value} {quote(_END_OF_VALUE)}")
        return [f"{name}: {quote(f'<parameter={self._key}>' + chr(10))} ({' | '.join(names)})", *rules]

    def _value(self, schema: Schema) -> str | None:
        """How values of one type are written, or ``None`` if the parser would read them as something else."""
        if "const" in schema:
            return self._constant(schema["const"])
        kind = schema["type"]
        if kind == "string":
            return self._text(schema)
        if kind == "null":
            return quote("null")
        if kind in ("object", "array"):
            return json_value({**schema, **_definitions(self._root)})
        if self._type is None:
            return None
        if kind in ("integer", "number"):  # which the parser reads as float64
            bounds = {"minimum": max(schema.get("minimum", -_EXACT), -_EXACT)}
            schema = {**schema, **bounds, "maximum": min(schema.get("maximum", _EXACT), _EXACT)}
        return json_value(schema)

    def _constant(self, value: Any) -> str | None:
        text = value if isinstance(value, str) else json.dumps(value)
        if _CLOSER in text or self._end in text:
            return None
        call = f"<function=f>\n<parameter={self._key}>\n{text}\n</parameter>\n</function>"
        properties = {self._key: {"type": self._type} if self._type else {}}
        tool = {"function": {"name": "f", "parameters": {"properties": properties}}}
        try:
            read = self._parser(call, [tool])["arguments"][self._key]
        except (ValueError, OverflowError):
            return None
        return quote(text) if json.dumps(read) == json.dumps(value) else None

    def _text(self, schema: Schema) -> str:
        parts = [f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/"]
        if "pattern" in schema:
            parts.append(f"/{_whole(schema['pattern'], self._where)}/")
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise ValueError(
                    f"{self._where}: the format {schema['format']!r} is not supported in this model's calls."
                )
            parts.append(f"/{_FORMATS[schema['format']]}/")
        parts += [_without(_CLOSER), _without(self._end), "~/(?i:null)/"]
        if self._type != "string":
            parts.append("~/(?s:[ \\t\\r\\n]*[\\[{].*)/")  # read as JSON, if it is some
        return f"({' & '.join(parts)})"


def _readable(function: Schema) -> Schema:
    try:
        schema = _parameters(function)
        types = {key: _type(_alternatives(value, schema, key)) for key, value in schema.get("properties", {}).items()}
    except ValueError:
        return function
    if not types:
        return function
    properties = {}
    for key, value in schema["properties"].items():
        rest = {rule: part for rule, part in value.items() if rule != "type"} if isinstance(value, Mapping) else {}
        properties[key] = rest | ({"type": types[key]} if types[key] else {})
    return {**function, "parameters": {**schema, "properties": properties}}
