"""Keywords of JSON Schema whose values are no schemas, as third parties write them."""

from collections.abc import Callable, Sequence
from typing import Any

from jsonschema import Draft202012Validator

from flashmoe_mlx.constrain.schema import TYPES, Schema, fault_of, json_value, types_of

Warn = Callable[[str], None]
"""Takes what is not enforced, in one line."""

# Texts and lists are never that long; llguidance counts in 32 bits.
_MAX_LENGTH = 2**31
# llguidance has bounds and constants in float64.
_MAX_NUMBER = 2**53

TOGETHER = 256
"""Longest text that may have its length and its pattern in the same grammar."""

APART = "\0lengths"
"""Keyword of a clean schema for a ``minLength`` and ``maxLength`` that are in a grammar of their own."""

LENGTHS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")

# Formats that llguidance has a pattern for. Others are annotations.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
# Names of types that mlx-lm's parsers know as well, and a few more.
_ALIASES = {"str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string"}
_ALIASES |= {"bool": "boolean", "float": "number", "double": "number", "decimal": "number", "int": "integer"}
_ALIASES |= {"long": "integer", "arr": "array", "list": "array", "tuple": "array", "dict": "object", "map": "object"}
_ALIASES |= {"none": "null", "nonetype": "null"}


def clean_types(given: Any, warn: Warn) -> str | list[str] | None:
    """Return the value of ``type``; ``None`` for any type."""
    names = [name for name in (given if isinstance(given, list | tuple) else [given]) if name is not None]
    types: list[str] = []
    for name in names:
        kind = name if name in TYPES else _ALIASES.get(str(name).lower())
        if kind != name:
            warn(f"there is no type {str(name)[:40]!r}: it is {f'read as {kind}' if kind else 'ignored'}")
        # With an unknown one among them, anything may be meant.
        if kind is None:
            return None
        types += [kind] if kind not in types else []
    return types[0] if len(types) == 1 else types or None


def clean_numbers(given: Schema, warn: Warn) -> dict[str, Any]:
    """Return the keywords that limit lengths and numbers."""
    found: dict[str, Any] = {}
    for key in (*LENGTHS, *BOUNDS):
        value = given.get(key)
        # In draft 4, it says that the bound itself is excluded.
        if key.startswith("exclusive") and isinstance(value, bool):
            value = given.get(key.removeprefix("exclusive").lower()) if value else None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            warn(f"{key} is ignored: it must be a number, not {str(value)[:40]!r}")
        elif key == "multipleOf" and value <= 0:
            warn(f"multipleOf is ignored: it must be positive, not {value}")
        elif key in BOUNDS:
            if abs(value) <= _MAX_NUMBER:
                found[key] = value
            else:
                warn(f"{key} {str(value)[:40]} is not enforced: it is too large")
        elif value < 0 or value % 1:
            warn(f"{key} is ignored: it must be a positive integer or zero, not {value}")
        elif value < _MAX_LENGTH:
            found[key] = int(value)
        elif key.startswith("min"):
            warn(f"{key} {str(value)[:40]} is not enforced: it is too large")
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
        if found.get(least, 0) > found.get(most, _MAX_LENGTH):
            warn(f"{most} is not enforced: it is less than {least}")
            del found[most]
    return found


def clean_text(given: Schema, lengths: dict[str, Any], warn: Warn) -> dict[str, Any]:
    """Return ``pattern`` and ``format``, as far as a grammar can hold them. Of both, the pattern is held.

    Args:
        given (dict): The schema as it is written.
        lengths (dict): Its ``minLength`` and ``maxLength``. If they must not be in the grammar that has the pattern,
            they are moved to :data:`APART`. A counter and the states of a pattern multiply.
        warn (Callable): Takes what is not enforced.
    """
    pattern, name = given.get("pattern"), given.get("format")
    if isinstance(pattern, str) and clean_pattern(pattern, warn):
        found: dict[str, Any] = {"pattern": pattern}
    else:
        if pattern is not None and not isinstance(pattern, str):
            warn("pattern is ignored: it must be a text")
        found = {"format": name} if isinstance(name, str) and name in _FORMATS else {}
    if max(lengths.values(), default=0) > TOGETHER:
        return found | {APART: lengths}
    if not found or not lengths:
        return found | lengths
    fault = fault_of(f"start: x\nx: {json_value({'type': 'string'} | found | lengths, {})}\n")
    if "Regex is empty" in fault:
        warn(f"{' and '.join(lengths)} are not enforced: no text of the pattern or format fits")
        return found
    return found | ({APART: lengths} if fault else lengths)


def clean_pattern(pattern: str, warn: Warn) -> bool:
    """Say whether a grammar can hold a pattern."""
    if fault := fault_of(f"start: x\nx: {json_value({'type': 'string', 'pattern': pattern}, {})}\n"):
        warn(f"the pattern {pattern[:80]!r} is not enforced: {fault}")
    return not fault


def clean_values(given: Schema, rules: Schema, warn: Warn) -> list[Any] | None:
    """Return the values of ``const`` or ``enum`` that fit the other rules; ``None`` if any value may fit.

    Args:
        given (dict): The schema as it is written.
        rules (dict): What is clean of it.
        warn (Callable): Takes what is not enforced.
    """
    simple = {rule: value for rule, value in rules.items() if rule in ("type", *LENGTHS, *BOUNDS, "pattern")}
    # A const that was left out is often written as null.
    left_out = given.get("const", given) is None and not _fits(None, simple)
    key = "const" if "const" in given and not left_out else "enum"
    values = [given["const"]] if key == "const" else given.get("enum")
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        warn("enum is ignored: it must be a list")
        return None
    fitting = [value for value in values if _fits(value, simple)]
    if not fitting:
        warn(f"{key} is not enforced: none of its values fits the other rules")
        return None
    if _has_large_number(fitting):
        warn(f"{key} is not enforced: it has numbers beyond 2**53")
        return None
    if other := sorted(rules.keys() & {"$ref", "anyOf", "allOf", "properties", "items"}):
        warn(f"{other[0]} together with {key} is not enforced")
    return fitting


def are_exclusive(parts: Sequence[Any]) -> bool:
    """Say whether it is clear that at most one of some clean schemas fits a value."""
    if any(isinstance(part, bool) for part in parts):
        return False
    kinds = []
    for part in parts:
        kind = part.get("type", TYPES)
        kind = {kind} if isinstance(kind, str) else set(kind)
        kinds.append(kind | {"integer"} if "number" in kind else kind)
    if sum(map(len, kinds)) == len(set.union(*kinds)):
        return True
    # Other values of a property that all of them require, or of their own.
    shared = set.intersection(*(set(part.get("required", ())) for part in parts))
    groups = [[part.get("properties", {}).get(name, {}) for part in parts] for name in shared]
    return any(_differ(group) for group in [parts, *groups])


def _differ(parts: Sequence[Any]) -> bool:
    if not all(isinstance(part, dict) and "enum" in part for part in parts):
        return False
    texts = [repr(value) for part in parts for value in part["enum"]]
    return len(texts) == len(set(texts))


def _has_large_number(value: Any) -> bool:
    """Say whether a value has a number that llguidance would round, or fail with."""
    if isinstance(value, dict | list):
        return any(map(_has_large_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER


def _fits(value: Any, rules: Schema) -> bool:
    try:
        return bool(Draft202012Validator(rules).is_valid(value))
    # Python may not know a pattern that llguidance knows.
    except Exception:
        kinds = rules.get("type", TYPES)
        return bool(types_of(value) & ({kinds} if isinstance(kinds, str) else set(kinds)))
