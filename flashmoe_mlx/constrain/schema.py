"""JSON schemas of tools, resolved into alternatives of one type each."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
"""A JSON schema, or a part of one."""

# A number may be an integer.
_TYPES = ("null", "boolean", "number", "string", "array", "object")

_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[A-Za-z0-9_]", "W": "[^A-Za-z0-9_]"}
_CLASSES |= {"s": "[ \\t\\r\\n]", "S": "[^ \\t\\r\\n]"}

_COMBINED = {"anyOf", "oneOf", "allOf", "not", "if", "dependentRequired", "dependentSchemas", "$ref"}
_OF_TEXT = {"minLength", "maxLength", "pattern", "format"}
_OF_OBJECT = {"patternProperties", "propertyNames", "minProperties", "maxProperties"}
_RULES = _COMBINED | _OF_TEXT | _OF_OBJECT | {"enum", "const", "minimum", "maximum", "exclusiveMinimum"}
_RULES |= {"exclusiveMaximum", "multipleOf", "items", "prefixItems", "minItems", "maxItems", "properties", "required"}


def parameters_of(function: Schema) -> Schema:
    """Return the schema of a function's arguments.

    Raises:
        ValueError: It has rules for all parameters together, or requires one that it does not have.
    """
    name, schema = function["name"], function.get("parameters") or {}
    if unsupported := sorted(schema.keys() & (_COMBINED | _OF_OBJECT | {"enum", "const"})):
        raise ValueError(
            f"{name}: {unsupported[0]} is not supported for all parameters together: set it on each parameter"
        )
    if missing := [key for key in schema.get("required", ()) if key not in schema.get("properties", {})]:
        raise ValueError(f"{name}: {missing[0]} is required, but not among the properties: add it")
    return schema


def alternatives(schema: Any, root: Schema, where: str, depth: int = 0) -> list[dict[str, Any]]:
    """Return the schemas that a parameter may fit, each with one ``type`` or one ``const``.

    Args:
        schema (dict or bool): The schema of the parameter.
        root (dict): The schema that references start at.
        where (str): Name of the parameter in error messages.
        depth (int): How many references and alternatives the schema is inside of.

    Raises:
        ValueError: The schema is not supported.
    """
    if depth > 16:
        raise ValueError(f"{where}: references and alternatives are nested more than 16 deep: flatten the schema")
    rest = {} if schema is True else dict(schema)
    for key in ("$ref", "anyOf", "oneOf", "allOf"):
        if key in rest:
            parts = rest.pop(key)
            parts = [_resolved(parts, root, where)] if key == "$ref" else parts
            if key == "allOf":
                parts = [functools.reduce(lambda a, b: _merged(a, b, where), parts)]
            merged = [_merged(rest, part, where) for part in parts]
            found = [choice for each in merged for choice in alternatives(each, root, where, depth + 1)]
            kinds = [choice["type"] for choice in found if "type" in choice]
            if key == "oneOf" and (len(kinds) > len(set(kinds)) or {"integer", "number"} <= set(kinds)):
                raise ValueError(f"{where}: oneOf with alternatives of the same type is not supported: use anyOf")
            return found
    types = rest.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    if "enum" in rest or "const" in rest:
        if other := sorted(rest.keys() & (_RULES - {"enum", "const"})):
            raise ValueError(f"{where}: {other[0]} together with enum or const is not supported: leave it out")
        values = rest.get("enum", [rest.get("const")])
        return [{"const": value} for value in values if set(types) & _types_of(value)]
    if unsupported := sorted(rest.keys() & _COMBINED):
        raise ValueError(f"{where}: {unsupported[0]} is not supported in this model's calls: leave it out")
    return [{**rest, "type": kind} for kind in types]


def definitions(schema: Schema) -> dict[str, Any]:
    """Return the parts of a schema that references may point to."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _resolved(reference: str, root: Schema, where: str) -> Any:
    found: Any = root
    try:
        start, *path = reference.split("/")
        for step in path:
            found = found[step.replace("~1", "/").replace("~0", "~")]
    except (KeyError, TypeError):
        start = ""
    if start != "#":
        raise ValueError(f"{where}: $ref points to nothing: {reference!r}")
    return found


def _merged(first: Any, second: Any, where: str) -> dict[str, Any]:
    """Return a schema with the rules of both."""
    first, second = ({} if schema is True else schema for schema in (first, second))
    if twice := sorted(key for key in first.keys() & second.keys() & (_RULES | {"type"}) if first[key] != second[key]):
        raise ValueError(f"{where}: two rules for {twice[0]} at once are not supported in this model's calls")
    return {**first, **second}


def _types_of(value: Any) -> set[str]:
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def parsed_type(choices: Sequence[Schema]) -> str | None:
    """Return the ``type`` that makes mlx-lm's parser of XML-style calls read a parameter as one of some alternatives.

    Of several types without text it is ``"object"``, which the parser reads as JSON. With text it is ``None``: the
    parser then still tells objects, arrays and null from text.

    Args:
        choices (Sequence[dict]): From :func:`alternatives`.
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


def ascii_classes(pattern: str) -> str:
    """Return a pattern with the classes of JSON Schema, which are ASCII; llguidance's have all of Unicode."""
    return re.sub(r"\\(.)", lambda found: _CLASSES.get(found[1], found[0]), pattern, flags=re.DOTALL)


def whole_text(pattern: str, where: str) -> str:
    """Turn a pattern that may match anywhere into one that matches the whole text.

    Args:
        pattern (str): The pattern.
        where (str): Name of the parameter in error messages.

    Raises:
        ValueError: It is anchored, and has alternatives outside a group.
    """
    pattern = ascii_classes(pattern)
    body = pattern.removeprefix("^")
    ends = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    body = body[:-1] if ends else body
    anchored = ends or pattern.startswith("^")
    if anchored and "|" in body and not re.fullmatch(r"\([^()]*\)|[^|()]*(\([^()]*\)[^|()]*)*", body):
        raise ValueError(f"{where}: in the pattern {pattern!r}, put alternatives into a group")
    before, after = ("" if pattern.startswith("^") else "(?s:.*)"), ("" if ends else "(?s:.*)")
    return f"{before}(?:{body}){after}".replace("/", "\\/")
