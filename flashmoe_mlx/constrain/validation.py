"""Validation of calls whose constraint was released."""

import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from flashmoe_mlx.constrain.schema import Schema


def validate_call(call: Schema, tools: Sequence[Schema]) -> str | None:
    """Return the first fault of a call in one line, or ``None`` if it fits the schema of its tool.

    Formats are annotations, as in JSON Schema itself. Never raises for a schema or for arguments.

    Args:
        call (dict): A call in OpenAI's form, ``{"function": {"name": ..., "arguments": ...}}``; the arguments are JSON
            or the values themselves.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.
    """
    function = call.get("function", call)
    name, arguments = function["name"], function["arguments"]
    schemas = [tool["function"].get("parameters") or {} for tool in tools if tool["function"]["name"] == name]
    if not schemas:
        return f"there is no tool {name!r}"
    try:
        values: Any = json.loads(arguments) if isinstance(arguments, str) else arguments
        fault = next(Draft202012Validator(schemas[0]).iter_errors(values), None)
    # jsonschema raises many kinds of exceptions for odd schemas.
    except Exception as error:
        return f"{name}: the call could not be checked: {str(error).splitlines()[0]}"
    return None if fault is None else f"{name}{fault.json_path.removeprefix('$')}: {fault.message.splitlines()[0]}"
