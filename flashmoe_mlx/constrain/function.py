"""Functions that may be called, with the schema that their arguments are held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx.constrain.alternatives import alternatives
from flashmoe_mlx.constrain.cleaning import Cleaned, clean
from flashmoe_mlx.constrain.lengths import LENGTHS_APART, only_length
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.weakening import weaken


@dataclass(frozen=True)
class Function:
    """A function of a tool.

    Args:
        name (str): Its name.
        schema (dict): A clean schema of its arguments, an object.
        definitions (dict): The schemas that references in it point to, by name.
        warnings (Sequence[str]): What of its schema is not enforced.
        is_strict (bool): All of its schema must be enforced.
    """

    name: str
    schema: dict[str, Any]
    definitions: dict[str, Any]
    warnings: Sequence[str] = ()
    is_strict: bool = False


def variants_of(functions: Sequence[Function]) -> list[Sequence[Function]]:
    """Return the functions once for each grammar: as they are, and for lengths that are apart."""
    variants = [functions]
    for key in LENGTHS_APART:
        parts = [only_length(key, function.schema, function.definitions) for function in functions]
        if any(part is not None for part in parts):
            variants.append(
                [
                    each if part is None else Function(each.name, *part)
                    for each, part in zip(functions, parts, strict=True)
                ]
            )
    return variants


def functions_of(tools: Sequence[Schema]) -> list[Function]:
    """Return the functions of tools.

    Args:
        tools (Sequence[dict]): Tools in OpenAI's form.

    Raises:
        ValueError: Parameters are no schema at all.
    """
    return [_function(tool["function"]) for tool in tools]


def _function(function: Schema) -> Function:
    name, schema = function["name"], function.get("parameters")
    cleaned = clean(schema, name)
    cleaned.schema = _flat(cleaned, name)
    weaken(cleaned, name)
    return Function(name, cleaned.schema, cleaned.definitions, tuple(cleaned.warnings), function.get("strict") is True)


def _flat(cleaned: Cleaned, name: str) -> dict[str, Any]:
    """Return the schema of all arguments as one object, without alternatives and references at the top."""
    objects = [each for each in alternatives(cleaned.schema, cleaned.definitions) if each.get("type") == "object"]
    if not objects:
        cleaned.warn(f"{name}: the parameters are no object: they are left free")
        return {"type": "object"}
    if len(objects) == 1:
        return objects[0]
    cleaned.warn(f"{name}: anyOf of all parameters together is not enforced")
    properties: dict[str, list[Any]] = {}
    for each in objects:
        for key, part in each.get("properties", {}).items():
            parts = properties.setdefault(key, [])
            parts += [part] if part not in parts else []
    required = [
        key for key in objects[0].get("required", ()) if all(key in each.get("required", ()) for each in objects)
    ]
    closed = all(each.get("additionalProperties") is False for each in objects)
    flat: dict[str, Any] = {"type": "object", "required": required}
    flat["properties"] = {key: parts[0] if len(parts) == 1 else {"anyOf": parts} for key, parts in properties.items()}
    return flat | ({"additionalProperties": False} if closed else {})
