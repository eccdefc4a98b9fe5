"""JSON schemas of tools, resolved to alternatives of one type each."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_TYPES = ("null", "boolean", "number", "string", "array", "object")  # a number may be an integer

_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[A-Za-z0-9_]", "W": "[^A-Za-z0-9_]"}

_CLASSES |= {"s": "[ \\t\\r\\n]", "S": "[^ \\t\\r\\n]"}

_COMBINED = {"anyOf", "oneOf", "allOf", "not", "if", "dependentRequired", "dependentSchemas", "$ref"}

_OF_TEXT = {"minLength", "maxLength", "pattern", "format"}

_OF_OBJECT = {"patternProperties", "propertyNames", "minProperties", "maxProperties"}

_RULES = _COMBINED | _OF_TEXT | _OF_OBJECT | {"enum", "const", "minimum", "maximum", "exclusiveMinimum"}

_RULES |= {"exclusiveMaximum", "multipleOf", "items", "prefixItems", "minItems", "maxItems", "properties", "required"}


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
