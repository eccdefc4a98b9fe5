"""Grammars of tool calls, in llguidance's dialect of Lark: calls that mlx-lm's parser reads back as they were meant.

The parser of Qwen's XML-style calls turns the text of a parameter into a value by the ``type`` of its schema. What it
would get wrong, such as the string "null", cannot be written under these grammars.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
Parser = Callable[[str, list[Any]], Any]

_TYPES = ("null", "boolean", "number", "string", "array", "object")  # a number may be an integer
_CLOSER = "</parameter>"
_END_OF_VALUE = f"\n{_CLOSER}\n"
_EXACT = 2**53 - 1  # the parser reads integers as float64
_FINEST = 1e-9  # digits behind the point
_NOT_INFINITE = r"~/(?s:.*[0-9][eE][+-]?[0-9]{3}.*)/"  # as JSON of any type could be
_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[A-Za-z0-9_]", "W": "[^A-Za-z0-9_]"}
_CLASSES |= {"s": "[ \\t\\r\\n]", "S": "[^ \\t\\r\\n]"}
_MOST_PARAMETERS = 64  # llguidance counts in so many bits which of them have been written
_COMBINED = {"anyOf", "oneOf", "allOf", "not", "if", "dependentRequired", "dependentSchemas", "$ref"}
_OF_TEXT = {"minLength", "maxLength", "pattern", "format"}
_OF_OBJECT = {"patternProperties", "propertyNames", "minProperties", "maxProperties"}
_RULES = _COMBINED | _OF_TEXT | _OF_OBJECT | {"enum", "const", "minimum", "maximum", "exclusiveMinimum"}
_RULES |= {"exclusiveMaximum", "multipleOf", "items", "prefixItems", "minItems", "maxItems", "properties", "required"}

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


def json_calls(functions: Sequence[Schema], end: str, closing: str) -> list[str]:
    """Grammars of Hermes-style calls, from the opening tag on; a call keeps to all of them.

    Args:
        functions: what may be called, as in OpenAI's API.
        end: the closing tag.
        closing: the same in the grammar.
    """
    rules = []
    for index, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        call = {"name": {"const": function["name"]}, "arguments": schema}
        whole = {"type": "object", "properties": call, "required": ["name", "arguments"]}
        whole |= {"additionalProperties": False} | _definitions(schema)
        rules.append(f'call_{index}: "\\n" {json_value(whole)} "\\n"')
    # A string may not hold the closing tag, which would end the call there.
    envelope = f'start: CALL {closing}\nCALL: "\\n" (/[^\\n]*/ & {_without(end)} & {_NOT_INFINITE}) "\\n"\n'
    return [_grammar(functions, closing, rules), envelope]


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


def json_value(schema: Schema) -> str:
    """JSON that fits the schema, at most one space after a comma or colon, numbers up to 2**53 with 9 decimals.

    A weak model could fill a file with spaces or digits.
    """
    spacing = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return "%json " + json.dumps({**_bounded(schema), "x-guidance": spacing})


def _bounded(schema: Any) -> Any:
    """The schema with bounds for the numbers that have none."""
    if not isinstance(schema, Mapping):
        return schema
    bounded = dict(schema)
    for key, part in schema.items():
        if key in ("properties", "$defs", "definitions"):
            bounded[key] = {name: _bounded(each) for name, each in part.items()}
        elif key in ("items", "additionalProperties"):
            bounded[key] = _bounded(part)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            bounded[key] = [_bounded(each) for each in part]
    if "pattern" in schema:
        bounded["pattern"] = _ascii(schema["pattern"])
    kinds = schema.get("type", ())
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds & {"integer", "number"} and not schema.keys() & {"enum", "const"}:
        if "exclusiveMinimum" not in schema:
            bounded.setdefault("minimum", -_EXACT)
        if "exclusiveMaximum" not in schema:
            bounded.setdefault("maximum", _EXACT)
        if "number" in kinds:
            bounded.setdefault("multipleOf", _FINEST)
    return bounded


def quote(text: str) -> str:
    """A text in the grammar."""
    return json.dumps(text)


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


def _parameters(function: Schema) -> Schema:
    """The schema of a function's arguments.

    Raises:
        ValueError: it is more than a list of parameters.
    """
    name, schema = function["name"], function.get("parameters") or {}
    if unsupported := sorted(schema.keys() & (_COMBINED | _OF_OBJECT | {"enum", "const"})):
        raise ValueError(f"{name}: {unsupported[0]} is not supported for all parameters together.")
    if missing := [key for key in schema.get("required", ()) if key not in schema.get("properties", {})]:
        raise ValueError(f"{name}: {missing[0]} is required, and is not among the properties.")
    return schema


def _alternatives(schema: Any, root: Schema, where: str, depth: int = 0) -> list[dict[str, Any]]:
    """What a parameter may be: schemas, each with one ``type`` or one ``const``.

    Raises:
        ValueError: it is not supported.
    """
    if depth > 16:
        raise ValueError(f"{where}: more than 16 references or alternatives inside each other are not supported.")
    rest = {} if schema is True else dict(schema)
    for key in ("$ref", "anyOf", "oneOf", "allOf"):
        if key in rest:
            parts = rest.pop(key)
            parts = [_resolved(parts, root, where)] if key == "$ref" else parts
            if key == "allOf":
                parts = [functools.reduce(lambda a, b: _merged(a, b, where), parts)]
            merged = [_merged(rest, part, where) for part in parts]
            found = [choice for each in merged for choice in _alternatives(each, root, where, depth + 1)]
            kinds = [choice["type"] for choice in found if "type" in choice]
            if key == "oneOf" and (len(kinds) > len(set(kinds)) or {"integer", "number"} <= set(kinds)):
                raise ValueError(f"{where}: oneOf with alternatives of the same type is not supported; try anyOf.")
            return found
    types = rest.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    if "enum" in rest or "const" in rest:
        if beside := sorted(rest.keys() & (_RULES - {"enum", "const"})):
            raise ValueError(f"{where}: {beside[0]} beside enum or const is not supported in this model's calls.")
        values = rest.get("enum", [rest.get("const")])
        return [{"const": value} for value in values if set(types) & _types_of(value)]
    if unsupported := sorted(rest.keys() & _COMBINED):
        raise ValueError(f"{where}: {unsupported[0]} is not supported in this model's calls.")
    return [{**rest, "type": kind} for kind in types]


def _resolved(reference: str, root: Schema, where: str) -> Any:
    found: Any = root
    try:
        start, *path = reference.split("/")
        for step in path:
            found = found[step.replace("~1", "/").replace("~0", "~")]
    except (KeyError, TypeError):
        start = ""
    if start != "#":
        raise ValueError(f"{where}: $ref leads nowhere: {reference!r}.")
    return found


def _merged(first: Any, second: Any, where: str) -> dict[str, Any]:
    """A schema that says what both say."""
    first, second = ({} if schema is True else schema for schema in (first, second))
    if twice := sorted(key for key in first.keys() & second.keys() & (_RULES | {"type"}) if first[key] != second[key]):
        raise ValueError(f"{where}: {twice[0]} twice, of which both count, is not supported in this model's calls.")
    return {**first, **second}


def _types_of(value: Any) -> set[str]:
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def _type(choices: Sequence[Schema]) -> str | None:
    """The ``type`` by which the parser reads a parameter: of several without text ``object``, which it reads as JSON.

    With text among them ``None``: it then still tells objects and arrays from text, and null, as it always does.
    """
    types = set()
    for choice in choices:
        kinds = _types_of(choice["const"]) if "const" in choice else {choice["type"]}
        types.add("number" if "number" in kinds else kinds.pop())
    types -= {"null"} if len(types) > 1 else set()
    if types == {"integer", "number"}:
        return "number"
    if len(types) > 1:
        return None if "string" in types else "object"
    return types.pop()


def _ascii(pattern: str) -> str:
    """The pattern with classes as JSON Schema has them, of ASCII alone: llguidance's have all of Unicode."""
    return re.sub(r"\\(.)", lambda found: _CLASSES.get(found[1], found[0]), pattern, flags=re.DOTALL)


def _whole(pattern: str, where: str) -> str:
    """A pattern that may match anywhere, as one of the whole text."""
    pattern = _ascii(pattern)
    body = pattern.removeprefix("^")
    ends = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    body = body[:-1] if ends else body
    anchored = ends or pattern.startswith("^")
    if anchored and "|" in body and not re.fullmatch(r"\([^()]*\)|[^|()]*(\([^()]*\)[^|()]*)*", body):
        raise ValueError(f"{where}: in the pattern {pattern!r}, put alternatives into a group of their own.")
    before, after = ("" if pattern.startswith("^") else "(?s:.*)"), ("" if ends else "(?s:.*)")
    return f"{before}(?:{body}){after}".replace("/", "\\/")


def _without(tag: str) -> str:
    """Texts that do not hold the tag."""
    escaped = re.escape(tag).replace("/", "\\/")
    return f"~/(?s:.*{escaped}.*)/"


def _grammar(functions: Sequence[Schema], closing: str, rules: Sequence[str]) -> str:
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    return "\n".join([f"start: ({calls}) {closing}", *rules]) + "\n"


def _definitions(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}
