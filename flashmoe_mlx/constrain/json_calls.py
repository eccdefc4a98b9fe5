"""Grammars of Hermes-style JSON tool calls, and of JSON values."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe_mlx.constrain.schema import Schema, _ascii

_EXACT = 2**53 - 1  # the parser reads integers as float64

_FINEST = 1e-9  # digits behind the point

_NOT_INFINITE = r"~/(?s:.*[0-9][eE][+-]?[0-9]{3}.*)/"  # as JSON of any type could be


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


def _without(tag: str) -> str:
    """Texts that do not hold the tag."""
    escaped = re.escape(tag).replace("/", "\\/")
    return f"~/(?s:.*{escaped}.*)/"


def _grammar(functions: Sequence[Schema], closing: str, rules: Sequence[str]) -> str:
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    return "\n".join([f"start: ({calls}) {closing}", *rules]) + "\n"


def _definitions(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}
