"""Cleaning of schemas: what is odd is dropped or rewritten, what no grammar can hold is left free.

The result has only keywords that llguidance knows, each with a value of the right kind, and references into one flat
set of definitions, so that each part of it can be cut out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashmoe_mlx.constrain.keywords import (
    are_exclusive,
    clean_numbers,
    clean_pattern,
    clean_text,
    clean_types,
    clean_values,
)
from flashmoe_mlx.constrain.references import PREFIX, endless, target_of
from flashmoe_mlx.constrain.schema import Schema

# llguidance follows no more of them token by token.
_MAX_PROPERTIES = 400
# Its recursion must fit in the stack of a thread, which is half a megabyte on a Mac.
_MAX_DEPTH = 32

# Rules that no grammar can hold, with the values that rule nothing out.
_FREE: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "if": (),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "minProperties": (0,),
    "maxProperties": (),
    "uniqueItems": (False,),
    "contains": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "$dynamicRef": (),
}

_MAX_PLACE = 100

_Part = Callable[[Any, str], Any]


@dataclass
class Cleaned:
    """A schema that grammars can be made of.

    Args:
        schema (dict or bool): The schema.
        definitions (dict): The schemas that references point to, by name.
        warnings (list[str]): What is left free, one line each.
    """

    schema: Any
    definitions: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Add a warning."""
        message = " ".join(message.splitlines())
        if message not in self.warnings:
            self.warnings.append(message)


def clean(schema: Any, where: str) -> Cleaned:
    """Return a schema without what is odd in it.

    Args:
        schema (Any): A schema of a third party; ``None`` allows anything.
        where (str): The place of the schema, for messages.

    Raises:
        ValueError: It, or a part of it, is no schema at all.
    """
    cleaner = _Cleaner(schema)
    cleaned = cleaner.cleaned
    cleaned.schema = cleaner.clean(schema, where, 0)
    for name in endless(cleaned.definitions):
        cleaned.warn(f"{where}: a $ref leads back to itself without an end: it is left free")
        cleaned.definitions[name] = {}
    return cleaned


class _Cleaner:
    """Cleans the parts of one schema.

    Args:
        root (Any): The schema that references start at.
    """

    def __init__(self, root: Any):
        self._root = root
        self._names: dict[str, str] = {}
        self.cleaned = Cleaned({})

    def clean(self, schema: Any, where: str, depth: int) -> Any:
        # PHP writes an empty object as an empty list.
        if schema is None or schema == [] or isinstance(schema, bool):
            return schema is not False and {}
        if not isinstance(schema, Mapping):
            raise ValueError(f"{where} is no schema: it must be an object, not {str(schema)[:40]!r}")
        if depth > _MAX_DEPTH:
            self.cleaned.warn(f"{where}: the schema is nested more than {_MAX_DEPTH} deep: the rest is left free")
            return {}

        def warn(message: str) -> None:
            self.cleaned.warn(f"{where}: {message}")

        def part(value: Any, name: str) -> Any:
            # Deep places are named by their beginning.
            return self.clean(value, where if len(where) > _MAX_PLACE else f"{where}.{name}", depth + 1)

        given = {str(key): value for key, value in schema.items() if value is not None or key == "const"}
        types = clean_types(given.get("type"), warn)
        found: dict[str, Any] = {"type": types} if types else {}
        found |= clean_numbers(given, warn)
        lengths: dict[str, Any] = {key: found.pop(key) for key in ("minLength", "maxLength") if key in found}
        found |= clean_text(given, lengths, warn)
        found |= _object(given, warn, part) | _array(given, part) | _combinations(given, warn, part)
        reference = given.get("$ref", given.get("$recursiveRef"))
        if reference is not None:
            found |= self._reference(reference, where, depth)
        for key, trivial in _FREE.items():
            if key in given and not any(given[key] == value for value in trivial):
                warn(f"{key} is not enforced")
        values = clean_values(given, found, warn)
        return found if values is None else {"enum": values}

    def _reference(self, reference: Any, where: str, depth: int) -> dict[str, Any]:
        reference = str(reference)
        if reference not in self._names:
            try:
                target = target_of(reference, self._root)
            except LookupError:
                self.cleaned.warn(f"{where}: $ref points to nothing here: {reference[:80]!r} is left free")
                return {}
            self._names[reference] = name = f"d{len(self._names)}"
            # Known before it is clean, since it may contain itself.
            self.cleaned.definitions[name] = {}
            self.cleaned.definitions[name] = self.clean(target, f"{where}({reference})", depth + 1)
        return {"$ref": PREFIX + self._names[reference]}


def _object(given: Schema, warn: Callable[[str], None], part: _Part) -> dict[str, Any]:
    properties, patterns = (_mapping(given, key, warn) for key in ("properties", "patternProperties"))
    additional = given.get("additionalProperties")
    combined = given.keys() & {"$ref", "anyOf", "oneOf", "allOf", "if", "dependentSchemas"}
    if additional is None and not combined and given.get("unevaluatedProperties") is False:
        additional = False
    names = given.get("required")
    # In draft 3, each property has a boolean.
    names = names if isinstance(names, list | tuple) else ()
    required = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    if additional is False and not patterns:
        for name in required:
            if name not in properties:
                warn(f"{name!r} is required, but not allowed: it is not enforced")
        required = [name for name in required if name in properties]
    if len(properties) > _MAX_PROPERTIES:
        warn(f"{len(properties)} properties are too many: all but {_MAX_PROPERTIES} are left free")
        kept = set(sorted(properties, key=lambda name: name not in required)[:_MAX_PROPERTIES])
        properties, additional = {name: properties[name] for name in properties if name in kept}, None
        required = required[:_MAX_PROPERTIES]
    found: dict[str, Any] = {"properties": {name: part(each, name) for name, each in properties.items()}}
    found["required"] = required
    found["patternProperties"] = {
        pattern: part(each, pattern) for pattern, each in patterns.items() if clean_pattern(pattern, warn)
    }
    # The names of a pattern that is not held must stay possible.
    if additional is not None and len(found["patternProperties"]) == len(patterns):
        found["additionalProperties"] = part(additional, "additionalProperties")
    return {key: value for key, value in found.items() if value or key == "additionalProperties"}


def _array(given: Schema, part: _Part) -> dict[str, Any]:
    items, first = given.get("items"), given.get("prefixItems")
    # In drafts up to 2019.
    if isinstance(items, list | tuple):
        first, items = items, given.get("additionalItems")
    found = {}
    if isinstance(first, list | tuple) and first:
        found["prefixItems"] = [part(each, f"prefixItems[{index}]") for index, each in enumerate(first)]
    if items is not None:
        found["items"] = part(items, "items")
    return found


def _combinations(given: Schema, warn: Callable[[str], None], part: _Part) -> dict[str, Any]:
    parts: dict[str, list[Any]] = {}
    for key in ("anyOf", "oneOf", "allOf"):
        value = given.get(key, ())
        if not isinstance(value, list | tuple):
            warn(f"{key} is ignored: it must be a list")
            value = ()
        parts[key] = [part(each, f"{key}[{index}]") for index, each in enumerate(value) if each is not None]
    if len(parts["oneOf"]) > 1 and not are_exclusive(parts["oneOf"]):
        warn("oneOf is enforced as anyOf")
    if parts["anyOf"] and parts["oneOf"]:
        parts["allOf"].append({"anyOf": parts["oneOf"]})
    found = {"anyOf": parts["anyOf"] or parts["oneOf"], "allOf": parts["allOf"]}
    return {key: value for key, value in found.items() if value}


def _mapping(given: Schema, key: str, warn: Callable[[str], None]) -> dict[str, Any]:
    value = given.get(key, {})
    if isinstance(value, Mapping):
        return {str(name): each for name, each in value.items()}
    if value != []:
        warn(f"{key} is ignored: it must be an object")
    return {}
