"""Schemas as third parties write them, for Hypothesis: every keyword of draft 2020-12, nulls, values of any kind."""

from typing import Any

from hypothesis import strategies as st

TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]
ODD_TYPES = ["str", "int", "float", "any", "file", "", "Integer"]
FORMATS = [
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "idn-email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uri-reference",
]
FORMATS += ["iri", "uuid", "uri-template", "json-pointer", "regex", "password", "int32", "binary", "path", "€"]
PATTERNS = [
    "^[a-z]{2,4}$",
    "^\\d+$",
    "b",
    "^(a|b)",
    "/x$",
    "[:|-]",
    "^I?[0-9]+[:|-][0-9]+$",
    "(?=a)b",
    "^(?!x).*$",
    "(a)\\1",
]
PATTERNS += [
    "^$",
    "^a|b$",
    "\\p{L}+",
    "(",
    "[",
    "a{2,1}",
    "^\\$\\d\\.\\d\\d$",
    "\\bword\\b",
    "(?<n>a)",
    "^\\/",
    "a^b",
    "\n",
]
NAMES = st.sampled_from(
    ["a", "b", "kids", "two words", "x>y", "a<b", "", "ключ", 'q"uote', "line\nbreak", "$ref", "type"]
)
VALUES = st.sampled_from(
    [None, True, False, 0, 1, -1.5, 7, 2**70, "", "a", "noun", "null", "3", "{", [], [1], {}, {"a": 1}]
)
JUNK = st.sampled_from([None, None, None, "5", -1, 2.5, True, [], {}, "text", [None], {"a": None}])
NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 0.5, -3, 2**53, 1e300, 10**30])
LENGTHS = st.integers(0, 4)
REFERENCES = st.sampled_from(
    ["#", "#/$defs/tree", "#/definitions/tree", "#/properties/a", "#/properties/b/items", "#node"]
)
REFERENCES |= st.sampled_from(
    ["#/nowhere", "http://example.com/schema.json", "#/$defs/loop", "#/$defs/list", "other.json#/a"]
)


def _keywords(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(parts, max_size=3)
    named = st.dictionaries(NAMES, parts, max_size=3)
    names = st.lists(NAMES, max_size=3)
    simple: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from([*TYPES, *ODD_TYPES]) | st.lists(st.sampled_from([*TYPES, None, "str"]), max_size=3),
        "enum": st.lists(VALUES, max_size=4),
        "const": VALUES,
        "multipleOf": NUMBERS,
        "minimum": NUMBERS,
        "maximum": NUMBERS,
        "exclusiveMinimum": NUMBERS | st.booleans(),
        "exclusiveMaximum": NUMBERS | st.booleans(),
        "minLength": LENGTHS,
        "maxLength": LENGTHS | st.sampled_from([300, 2**40]),
        "pattern": st.sampled_from(PATTERNS),
        "format": st.sampled_from(FORMATS),
        "minItems": LENGTHS.filter(lambda length: length < 3),
        "maxItems": LENGTHS,
        "uniqueItems": st.booleans(),
        "minContains": LENGTHS,
        "maxContains": LENGTHS,
        "minProperties": LENGTHS,
        "maxProperties": LENGTHS,
        "required": names,
        "dependentRequired": st.dictionaries(NAMES, names, max_size=2),
        "$ref": REFERENCES,
        "$dynamicRef": REFERENCES,
        "$anchor": st.just("node"),
        "$comment": st.just("a comment"),
        "title": st.just("A title"),
        "description": st.just("A description"),
        "default": VALUES,
        "examples": st.lists(VALUES, max_size=2),
        "deprecated": st.booleans(),
        "readOnly": st.booleans(),
        "contentEncoding": st.just("base64"),
        "contentMediaType": st.just("text/plain"),
        "nullable": st.booleans(),
        "x-order": st.just(3),
    }
    nested: dict[str, st.SearchStrategy[Any]] = {
        "properties": named,
        "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), parts, max_size=2),
        "additionalProperties": parts | st.booleans(),
        "propertyNames": parts,
        "unevaluatedProperties": parts | st.booleans(),
        "dependentSchemas": named,
        "items": parts | several,
        "prefixItems": several,
        "contains": parts,
        "unevaluatedItems": parts | st.booleans(),
        "anyOf": several,
        "oneOf": several,
        "allOf": several,
        "not": parts,
        "if": parts,
        "then": parts,
        "else": parts,
        "contentSchema": parts,
    }
    # Any keyword may have a value of a wrong kind, but where a schema must be there is one, or null.
    junk = {key: values | JUNK for key, values in simple.items()}
    junk |= {key: values | st.sampled_from([None, [], {}]) for key, values in nested.items() if key != "items"}
    junk["items"] = nested["items"] | st.none()
    usual = ["type", "properties", "required", "items", "enum", "anyOf", "$ref", "pattern", "description"]
    keys = st.lists(st.sampled_from([*usual, *usual, *junk]), max_size=4, unique=True)
    return keys.flatmap(lambda chosen: st.fixed_dictionaries({key: junk[key] for key in chosen}))


_LEAVES = st.sampled_from(
    [{}, True, False, None, {"type": "string"}, {"type": "integer"}, {"type": ["string", "null"]}]
)
_PARTS = st.recursive(_LEAVES, _keywords, max_leaves=6)
_TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "string"}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["leaf"],
}
_DEFINITIONS = {"tree": _TREE, "loop": {"$ref": "#/$defs/loop"}}
_DEFINITIONS |= {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "minItems": 1}}

PARAMETERS = st.builds(
    lambda properties, rest, required: (
        rest | {"type": "object", "properties": properties, "required": required, "$defs": _DEFINITIONS}
    ),
    st.dictionaries(NAMES, _PARTS, max_size=3),
    _keywords(_PARTS).filter(lambda schema: schema is not None),
    st.lists(NAMES, max_size=2) | st.none(),
)
"""Schemas of the parameters of a function."""
