"""The alternatives that a clean schema consists of, one type or some values each."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from flashmoe_mlx.constrain.references import PREFIX
from flashmoe_mlx.constrain.schema import TYPES, Schema, types_of

# Combinations of anyOf inside allOf multiply.
_MOST = 64
_LOWER = ("minLength", "minItems", "minimum", "exclusiveMinimum")
_UPPER = ("maxLength", "maxItems", "maximum", "exclusiveMaximum")


def alternatives(schema: Any, definitions: Schema) -> list[dict[str, Any]]:
    """Return schemas of which a value must fit one, each with one ``type`` or an ``enum`` of values of any type.

    Where two rules of the same name meet that cannot be merged, the first one counts.

    Args:
        schema (dict or bool): A clean schema.
        definitions (dict): The schemas that its references point to.
    """
    found: list[dict[str, Any]] = []
    for each in _flat(schema, definitions, frozenset()):
        if "enum" in each:
            found.append({"enum": each["enum"]})
            continue
        types = each.get("type", [name for name in TYPES if name != "integer"])
        found += [{**each, "type": kind} for kind in ([types] if isinstance(types, str) else types)]
    return found


def _flat(schema: Any, definitions: Schema, seen: frozenset[str]) -> list[dict[str, Any]]:
    if isinstance(schema, bool):
        return [{}] if schema else []
    combined = ("$ref", "anyOf", "allOf")
    groups = [[{key: value for key, value in schema.items() if key not in combined}]]
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(PREFIX)
        # Inside itself, it adds nothing.
        groups.append([] if name in seen else _flat(definitions[name], definitions, seen | {name}))
    if "anyOf" in schema:
        groups.append([each for part in schema["anyOf"] for each in _flat(part, definitions, seen)])
    groups += [_flat(part, definitions, seen) for part in schema.get("allOf", ())]
    found: list[dict[str, Any]] = groups[0]
    for group in groups[1:]:
        merged = [_merged(*pair) for pair in product(found, group[:_MOST])]
        found = [each for each in merged if each is not None][:_MOST]
    return found


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """Return a schema with the rules of both; ``None`` if nothing fits both."""
    merged = {**second, **first}
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        if key in _LOWER:
            merged[key] = max(a, b)
        elif key in _UPPER:
            merged[key] = min(a, b)
        elif key == "required":
            merged[key] = list(dict.fromkeys([*a, *b]))
        elif key == "properties":
            both = {name: {"allOf": [a[name], b[name]]} for name in a.keys() & b.keys() if a[name] != b[name]}
            merged[key] = {**b, **a, **both}
        elif key == "enum":
            merged[key] = [value for value in a if value in b]
    if "type" in first and "type" in second:
        types = _common(_names(first["type"]), _names(second["type"]))
        merged["type"] = types[0] if len(types) == 1 else types
    if "enum" in merged and "type" in merged:
        merged["enum"] = [value for value in merged["enum"] if types_of(value) & set(_names(merged["type"]))]
    return None if merged.get("type", True) == [] or merged.get("enum", True) == [] else merged


def _names(types: str | Sequence[str]) -> list[str]:
    return [types] if isinstance(types, str) else list(types)


def _common(first: list[str], second: list[str]) -> list[str]:
    numbers = {"integer", "number"}
    both = [name for name in first if name in second]
    if "integer" not in both and numbers & set(first) and numbers & set(second) and "number" not in both:
        both.append("integer")
    return both
