"""JSON schemas, as third parties write them."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import llguidance

Schema = Mapping[str, Any]
"""A JSON schema, or a part of one."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one space after a comma or colon: a weak model could fill its answer with spaces."""


def json_value(schema: Schema, definitions: Schema, *, any_escape: bool = True) -> str:
    r"""Return a term of the grammar for JSON that fits a schema.

    Args:
        schema (dict): A schema that llguidance supports.
        definitions (dict): The schemas that its references point to, by name.
        any_escape (bool): Strings may have any character as an escape such as ``\u003c``.
    """
    options = {"x-guidance": SPACING | {"json_allow_general_unicode_escapes": any_escape}}
    return "%json " + json.dumps({**schema, "$defs": definitions, **options})


def types_of(value: Any) -> set[str]:
    """Return the types of a value. An integer is also a number."""
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if isinstance(value, int) or value.is_integer() else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


@functools.lru_cache(maxsize=4096)
def fault_of(grammar: str) -> str:
    """Return what llguidance has against a grammar in one line, or an empty text."""
    lines = llguidance.LLMatcher.validate_grammar(grammar).splitlines() or [""]
    # A faulty pattern is shown in the lines before the reason.
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (reasons or [lines[0].rpartition("JSON schema: ")[2]])[0]
