"""Grammars of Hermes-style tool calls, and of JSON values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe_mlx.constrain.lark import NOT_INFINITE, one_of_calls, without
from flashmoe_mlx.constrain.schema import Schema, ascii_classes, definitions

MAX_INTEGER = 2**53 - 1
"""Largest integer up to which float64, which parsers read numbers as, is exact."""

# Nine decimals.
_MULTIPLE_OF = 1e-9


def json_calls(functions: Sequence[Schema], end: str, closing: str) -> list[str]:
    """Return grammars of Hermes-style calls, from the opening tag on. A call must match all of them.

    Args:
        functions (Sequence[dict]): Functions that may be called, in OpenAI's form.
        end (str): The closing tag.
        closing (str): The closing tag as a term of the grammar.
    """
    rules = []
    for index, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        call = {"name": {"const": function["name"]}, "arguments": schema}
        whole = {"type": "object", "properties": call, "required": ["name", "arguments"]}
        whole |= {"additionalProperties": False} | definitions(schema)
        rules.append(f'call_{index}: "\\n" {json_value(whole)} "\\n"')
    # A closing tag inside a string would end the call there.
    envelope = f'start: CALL {closing}\nCALL: "\\n" (/[^\\n]*/ & {without(end)} & {NOT_INFINITE}) "\\n"\n'
    return [one_of_calls(len(functions), closing, rules), envelope]


def json_value(schema: Schema) -> str:
    """Return a term for JSON that fits a schema.

    There is at most one space after a comma or colon, and numbers are within 2**53 with at most 9 decimals: a weak
    model could fill its answer with spaces or digits.
    """
    spacing = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return "%json " + json.dumps({**_bounded(schema), "x-guidance": spacing})


def _bounded(schema: Any) -> Any:
    """Return the schema with bounds for the numbers that have none."""
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
        bounded["pattern"] = ascii_classes(schema["pattern"])
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    if types & {"integer", "number"} and not schema.keys() & {"enum", "const"}:
        if "exclusiveMinimum" not in schema:
            bounded.setdefault("minimum", -MAX_INTEGER)
        if "exclusiveMaximum" not in schema:
            bounded.setdefault("maximum", MAX_INTEGER)
        if "number" in types:
            bounded.setdefault("multipleOf", _MULTIPLE_OF)
    return bounded
