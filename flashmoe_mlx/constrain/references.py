"""References between the parts of a JSON schema."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from flashmoe_mlx.constrain.schema import Schema

PREFIX = "#/$defs/"
"""Start of the references in a clean schema; the name of a definition follows."""


def target_of(reference: str, root: Any) -> Any:
    """Return the part of a schema that a reference points to.

    Args:
        reference (str): A JSON pointer such as ``#/properties/x``, or the name of an anchor after ``#``.
        root (Any): The schema that it starts at.

    Raises:
        LookupError: It points to nothing.
    """
    own = root.get("$id") if isinstance(root, Mapping) else None
    if isinstance(own, str) and own:
        reference = reference.removeprefix(own.rstrip("#"))
    start, *steps = unquote(reference).split("/")
    if start not in ("#", ""):
        return _anchored(root, start)
    target = root
    try:
        for step in steps:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target[int(step)] if isinstance(target, list) else target[step]
    except (TypeError, ValueError) as error:
        raise LookupError(reference) from error
    return target


def _anchored(root: Any, anchor: str) -> Any:
    parts = [root]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if f"#{part.get('$anchor')}" == anchor:
                return part
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    raise LookupError(anchor)


def endless(definitions: Schema) -> set[str]:
    """Return the names of definitions that no value of a finite size fits, such as a list that must contain itself."""
    finite: set[str] = set()
    while found := {name for name in definitions.keys() - finite if _is_finite(definitions[name], finite)}:
        finite |= found
    return set(definitions) - finite


def _is_finite(schema: Any, finite: set[str]) -> bool:
    if isinstance(schema, bool) or "enum" in schema:
        return True
    if "$ref" in schema and schema["$ref"].removeprefix(PREFIX) not in finite:
        return False
    if "anyOf" in schema and not any(_is_finite(part, finite) for part in schema["anyOf"]):
        return False
    if not all(_is_finite(part, finite) for part in schema.get("allOf", ())):
        return False
    kinds = schema.get("type", "null")
    # A value of another type needs no parts.
    if not {kinds} & {"object", "array"} if isinstance(kinds, str) else set(kinds) - {"object", "array"}:
        return True
    properties, length = schema.get("properties", {}), schema.get("minItems", 0)
    first = schema.get("prefixItems", ())[:length]
    parts = [properties.get(name, {}) for name in schema.get("required", ())] + list(first)
    return all(_is_finite(part, finite) for part in [*parts, *([schema.get("items", {})] * (length > len(first)))])
