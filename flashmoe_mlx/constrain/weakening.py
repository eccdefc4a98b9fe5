"""Weakening of clean schemas that llguidance refuses: the faulty part is left free, the others are held."""

from typing import Any

from flashmoe_mlx.constrain.cleaning import Cleaned
from flashmoe_mlx.constrain.schema import Schema, fault_of, json_value

# Rules are dropped in this order until the rest is accepted.
_ORDER = (
    *("allOf", "anyOf", "$ref", "patternProperties", "format", "pattern"),
    *("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems"),
    *("prefixItems", "items", "additionalProperties", "required", "properties", "enum", "type"),
)


def weaken(cleaned: Cleaned, where: str) -> None:
    """Leave the parts of a schema free that llguidance does not accept, and add a warning for each.

    Args:
        cleaned (Cleaned): The schema, which is changed in place.
        where (str): Its place, for messages.
    """
    if cleaned.schema is False:
        cleaned.warn(f"{where}: no value fits the schema: it is left free")
        cleaned.schema = {}
    if not _fault(cleaned.schema, cleaned.definitions):
        return
    for name in cleaned.definitions:
        cleaned.definitions[name] = _weakened(cleaned.definitions[name], cleaned, where)
    cleaned.schema = _weakened(cleaned.schema, cleaned, where)


def _fault(schema: Any, definitions: Schema) -> str:
    # Nothing fits False, which llguidance accepts only inside another schema.
    if schema is False:
        return ""
    return fault_of(f"start: x\nx: {json_value(schema, definitions)}\n")


def _weakened(schema: Any, cleaned: Cleaned, where: str) -> Any:
    if not _fault(schema, cleaned.definitions):
        return schema
    schema = dict(schema)
    for key in ("properties", "patternProperties"):
        if key in schema:
            schema[key] = {name: _weakened(part, cleaned, f"{where}.{name}") for name, part in schema[key].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            schema[key] = _weakened(schema[key], cleaned, f"{where}.{key}")
    for key in ("anyOf", "allOf", "prefixItems"):
        if key in schema:
            schema[key] = [_weakened(part, cleaned, f"{where}.{key}[{i}]") for i, part in enumerate(schema[key])]
    for key in _ORDER:
        fault = _fault(schema, cleaned.definitions)
        if not fault:
            break
        if key in schema:
            del schema[key]
            cleaned.warn(f"{where}: {key} is not enforced: {fault[:200]}")
    return schema
