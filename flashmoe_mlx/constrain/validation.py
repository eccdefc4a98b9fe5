"""Validation of calls whose constraint was released."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from flashmoe_mlx.constrain.safe_validator import safe_validator
from flashmoe_mlx.constrain.schema import Schema

_META = Draft202012Validator(Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)
# More oddities than a schema has.
_MOST_ODDITIES = 1000


def validate_call(call: Schema, tools: Sequence[Schema]) -> str | None:
    """Return the first fault of a call in one line, or ``None`` if it fits the schema of its tool.

    Formats are annotations, as in JSON Schema itself. Rules that are not valid JSON Schema are ignored.

    Args:
        call (dict): A call in OpenAI's form, ``{"function": {"name": ..., "arguments": ...}}``; the arguments are JSON
            or the values themselves.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.
    """
    function = call.get("function", call)
    name, arguments = function["name"], function["arguments"]
    schemas = [tool["function"].get("parameters") for tool in tools if tool["function"]["name"] == name]
    if not schemas:
        return f"there is no tool {name!r}"
    try:
        values: Any = json.loads(arguments) if isinstance(arguments, str) else arguments
        fault = next(safe_validator(_sane(schemas[0])).iter_errors(values), None)
    # jsonschema raises many kinds of exceptions for schemas of third parties.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{name}: the call could not be checked: {reason[:200]}"
    if fault is None:
        return None
    return f"{name}{fault.json_path.removeprefix('$')}: {fault.message.splitlines()[0][:200]}"


def _sane(schema: Any) -> Any:
    """Return a schema without the keywords whose values JSON Schema does not allow."""
    if not isinstance(schema, dict):
        return True
    schema = copy.deepcopy(schema)
    for _ in range(_MOST_ODDITIES):
        fault = next((each for each in _META.iter_errors(schema) if each.absolute_path), None)
        if fault is None:
            break
        *steps, last = fault.absolute_path
        part: Any = schema
        for step in steps:
            part = part[step]
        # A schema of a name may be null, or PHP's empty list.
        if not part[last] and steps and steps[-1] in ("properties", "patternProperties", "$defs", "definitions"):
            part[last] = True
        else:
            del part[last]
    _drop_left_out(schema)
    return schema


def _drop_left_out(part: Any) -> None:
    """Drop each ``const`` of null that the ``type`` next to it rules out: it was left out, and written as null."""
    if isinstance(part, dict) and part.get("const", part) is None and "null" not in part.get("type", ["null"]):
        del part["const"]
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _drop_left_out(each)
