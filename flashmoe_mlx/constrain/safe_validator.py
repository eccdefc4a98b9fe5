"""A validator for schemas of strangers: it opens no URL, and no pattern keeps it busy."""

from collections.abc import Iterator
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from referencing import Registry

# Seconds of a search: of some patterns, the time doubles with each character of the text.
_SEARCH_TIMEOUT = 0.5


def safe_validator(schema: Any) -> Any:
    """Return a validator of draft 2020-12.

    A ``$ref`` finds only what is in the schema itself. Validation raises a TimeoutError for a pattern that takes too
    long. ``unevaluatedProperties`` is not checked, since jsonschema searches patterns for it in its own way.

    Args:
        schema (dict or bool): The schema.
    """
    # jsonschema's default registry fetches what it does not know.
    return _VALIDATOR(schema, registry=Registry())


def _found(pattern: str, text: str) -> bool:
    # With concurrent=True, other threads go on meanwhile.
    return regex.search(pattern, text, timeout=_SEARCH_TIMEOUT, concurrent=True) is not None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, part in patterns.items():
            for key, value in instance.items():
                if _found(pattern, key):
                    yield from validator.descend(value, part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, additional: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for key, value in instance.items():
            if key in known or any(_found(pattern, key) for pattern in patterns):
                continue
            if additional is False:
                yield ValidationError(f"{key!r} is not a property")
            else:
                yield from validator.descend(value, additional, path=key)


def _unchecked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    return iter(())


_VALIDATOR = extend(
    Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "unevaluatedProperties": _unchecked,
    },
)
