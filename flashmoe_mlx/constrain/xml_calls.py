"""Grammars of Qwen's XML-style tool calls, which mlx-lm's parser reads back as they were meant.

The parser turns the text of a parameter into a value by the ``type`` of its schema. Texts that it would get wrong, such
as the string "null", are not in these grammars.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmoe_mlx.constrain.json_calls import MAX_INTEGER, json_value
from flashmoe_mlx.constrain.lark import NOT_INFINITE, one_of_calls, quote, without
from flashmoe_mlx.constrain.schema import Schema, alternatives, definitions, parameters_of, parsed_type, whole_text

Parser = Callable[[str, list[Any]], Any]
"""One of mlx-lm's parsers of tool calls."""

_CLOSER = "</parameter>"
_END_OF_VALUE = f"\n{_CLOSER}\n"
# llguidance records in 64 bits which parameters have been written.
_MAX_PARAMETERS = 64

_DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"[1-9][0-9]{{3}}-{_DAY}"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# Every text of these fits the format; a few rare ones, such as February 29, are left out.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": "[A-Za-z0-9_+-]+(?:\\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\\.[A-Za-z0-9]+)+",
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
}


def xml_calls(functions: Sequence[Schema], end: str, closing: str, parser: Parser) -> list[str]:
    """Return grammars of calls in Qwen's XML style, from the opening tag on. A call must match all of them.

    Parameters come in any order. Numbers stay within 2**53, where the parser is exact.

    Args:
        functions (Sequence[dict]): Functions that may be called, in OpenAI's form.
        end (str): The closing tag.
        closing (str): The closing tag as a term of the grammar.
        parser (Callable): mlx-lm's parser, which will read the call with :func:`readable` tools.

    Raises:
        ValueError: A schema is not supported.
    """
    rules = []
    for index, function in enumerate(functions):
        name, schema = function["name"], parameters_of(function)
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        if len(properties) > _MAX_PARAMETERS:
            raise ValueError(f"{name}: {len(properties)} parameters are too many: {_MAX_PARAMETERS} are supported")
        # Required ones have the first bits.
        keys = sorted(properties, key=lambda key: key not in required)
        head, tail = quote(f"\n<function={name}>\n"), quote("</function>\n")
        if not keys:
            rules.append(f"call_{index}: {head} {tail}")
            continue
        rest = f"rest_{index}"
        options = [f"{tail} %if is_ones([0:{len(required)}])" if required else tail]
        for number, key in enumerate(keys):
            rule = f"parameter_{index}_{number}"
            options.append(f"{rule} {rest}::set_bit({number}) %if bit_clear({number})")
            rules += _Parameter(f"{name}.{key}", key, properties[key], schema, end, parser).rules(rule)
        rules += [f"call_{index}: {head} {rest}::0x0", f"{rest}::_: {' | '.join(options)}"]
    grammar = one_of_calls(len(functions), closing, rules)
    if "%json" not in grammar:
        return [grammar]
    # A string inside an object or array must not contain a closing tag either.
    value = f"(/(?s:.*)/ & {without(_CLOSER)} & {without(end)} & {NOT_INFINITE})"
    envelope = f"""start: HEAD PARAMETER* {quote("</function>" + chr(10))} {closing}
HEAD: /\\n<function=[^>]*>\\n/
PARAMETER: /<parameter=[^>]*>\\n/ {value} {quote(_END_OF_VALUE)}
"""
    return [grammar, envelope]


def readable(tools: Sequence[Schema]) -> list[dict[str, Any]]:
    """Return tools with which mlx-lm's parser of XML-style calls reads each value as it was meant.

    The parser knows a value's type by ``type`` alone: an integer that may be null, for example, must have
    ``"type": "integer"``.
    Tools whose schemas are not supported are returned as they are.

    Args:
        tools (Sequence[dict]): Tools in OpenAI's form.
    """
    return [{**tool, "function": _readable(tool["function"])} for tool in tools]


class _Parameter:
    """The values that may be written for one parameter of an XML-style call."""

    def __init__(self, where: str, key: str, schema: Schema, root: Schema, end: str, parser: Parser):
        if not all(re.fullmatch(r"[^\s<>]+", word) for word in where.rsplit(".", 1)):
            raise ValueError(f"{where}: names with spaces, < or > are not supported in this model's calls: rename it")
        self._where, self._key, self._root, self._end, self._parser = where, key, root, end, parser
        self._choices = alternatives(schema, root, where)
        self._type = parsed_type(self._choices)

    def rules(self, name: str) -> list[str]:
        """Return the rule of this name, and the ones that it refers to."""
        values = [value for choice in self._choices if (value := self._value(choice)) is not None]
        if not values:
            raise ValueError(f"{self._where}: mlx-lm's parser cannot read any of these values in this model's calls")
        rules, names = [], []
        for number, value in enumerate(values):
            terminal = not value.startswith("%json")
            names.append(f"{name}_{number}".upper() if terminal else f"{name}_{number}")
            rules.append(f"{names[-1]}: {value} {quote(_END_OF_VALUE)}")
        return [f"{name}: {quote(f'<parameter={self._key}>' + chr(10))} ({' | '.join(names)})", *rules]

    def _value(self, schema: Schema) -> str | None:
        """Return a term for values of one type, or ``None`` if the parser would read them as something else."""
        if "const" in schema:
            return self._constant(schema["const"])
        kind = schema["type"]
        if kind == "string":
            return self._text(schema)
        if kind == "null":
            return quote("null")
        if kind in ("object", "array"):
            return json_value({**schema, **definitions(self._root)})
        if self._type is None:
            return None
        # The parser reads numbers as float64.
        if kind in ("integer", "number"):
            bounds = {"minimum": max(schema.get("minimum", -MAX_INTEGER), -MAX_INTEGER)}
            schema = {**schema, **bounds, "maximum": min(schema.get("maximum", MAX_INTEGER), MAX_INTEGER)}
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
            parts.append(f"/{whole_text(schema['pattern'], self._where)}/")
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise ValueError(
                    f"{self._where}: the format {schema['format']!r} is not supported in this model's calls: "
                    f"use one of {', '.join(_FORMATS)}"
                )
            parts.append(f"/{_FORMATS[schema['format']]}/")
        parts += [without(_CLOSER), without(self._end), "~/(?i:null)/"]
        # The parser reads text that looks like JSON as JSON.
        if self._type != "string":
            parts.append("~/(?s:[ \\t\\r\\n]*[\\[{].*)/")
        return f"({' & '.join(parts)})"


def _readable(function: Schema) -> Schema:
    try:
        schema = parameters_of(function)
        types = {
            key: parsed_type(alternatives(value, schema, key)) for key, value in schema.get("properties", {}).items()
        }
    except ValueError:
        return function
    if not types:
        return function
    properties = {}
    for key, value in schema["properties"].items():
        rest = {rule: part for rule, part in value.items() if rule != "type"} if isinstance(value, Mapping) else {}
        properties[key] = rest | ({"type": types[key]} if types[key] else {})
    return {**function, "parameters": {**schema, "properties": properties}}
