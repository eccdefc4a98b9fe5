"""Lengths of texts that need a grammar of their own, since a counter and the states of a pattern multiply."""

from collections.abc import Mapping
from typing import Any

from flashmoe_mlx.constrain.keywords import APART

LENGTHS_APART = ("minLength", "maxLength")
"""Each of them has its own grammar."""


def only_length(key: str, schema: Any, definitions: Any) -> tuple[Any, Any] | None:
    """Return a clean schema and its definitions for the grammar of one length.

    Args:
        key (str): One of :data:`LENGTHS_APART`. The texts that have it apart have no other rules.
        schema (dict or bool): The schema.
        definitions (dict): The schemas that its references point to.

    Returns:
        tuple, optional: Both; ``None`` if no text has it apart.
    """
    found = (_only(key, schema), _only(key, definitions))
    return None if found == (schema, definitions) else found


def _only(key: str, part: Any) -> Any:
    if isinstance(part, Mapping):
        if key in part.get(APART, ()):
            return {name: part[name] for name in ("type",) if name in part} | {key: part[APART][key]}
        return {
            name: _only(key, value) if isinstance(value, Mapping) or name != "enum" else value
            for name, value in part.items()
        }
    return [_only(key, each) for each in part] if isinstance(part, list) else part
