"""Schemas of third parties: what is held, what is left free with a warning, and what is refused."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx import constrain
from tests.constrain.writing import fits, parameter, tool

TREE = {
    "type": "object",
    "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["word"],
}
NODE |= {"additionalProperties": False}


def held(writer, parameters, warnings=(), **arguments) -> bool:
    values = {key: json.dumps(value) for key, value in arguments.items()}
    return bool(writer.fits([tool(parameters)], writer.call(**values), warnings))


@pytest.mark.parametrize(("kids", "fit"), [([], True), ([{}], True), ([{"kids": [{"kids": []}]}], True), ([[]], False)])
def test_the_root_is_what_the_parameters_are(writer, kids, fit):
    assert held(writer, TREE, kids=kids) is fit


@pytest.mark.parametrize(
    ("reference", "more"),
    [
        ("#/$defs/node", {"$defs": {"node": NODE}}),
        ("#/definitions/node", {"definitions": {"node": NODE}, "$defs": {"node": NODE}}),
        ("#/properties/first", {"$defs": {"node": NODE}}),
        ("#/properties/first/properties/next", {"$defs": {"node": NODE}}),
        ("#/$defs/choice/anyOf/1", {"$defs": {"node": NODE, "choice": {"anyOf": [{"type": "null"}, NODE]}}}),
        ("#/$defs/a~1b%20c", {"$defs": {"node": NODE, "a/b c": NODE}}),
        ("#node", {"$defs": {"node": NODE, "other": {"$anchor": "node", **NODE}}}),
        ("http://example.com/s#/$defs/node", {"$id": "http://example.com/s", "$defs": {"node": NODE}}),
    ],
)
def test_references_point_into_the_whole_schema(writer, reference, more):
    schema = {"type": "object", "properties": {"first": NODE, "x": {"$ref": reference}}, "required": ["x"], **more}
    value = {"word": "a", "next": {"word": "b"}}
    assert held(writer, schema, x=value)
    assert not held(writer, schema, x={"word": "a", "next": {"word": 3}})
    assert not held(writer, schema, x=[])
    # Inside a list, which is cut out in an XML-style call.
    schema["properties"]["x"] = {"type": "array", "items": {"$ref": reference}}
    assert held(writer, schema, x=[value])
    assert not held(writer, schema, x=[{"next": value}])


@pytest.mark.parametrize("reference", ["#/nowhere", "other.json", "#/properties/x/0", "#anchor"])
def test_a_reference_to_nothing_is_left_free(writer, reference):
    warnings = [f"f.x: $ref points to nothing here: {reference!r} is left free"]
    assert held(writer, parameter({"$ref": reference})[0]["function"]["parameters"], warnings, x=[1])


@pytest.mark.parametrize(
    "loop",
    [
        {"$ref": "#/$defs/loop"},
        {"type": "object", "properties": {"y": {"$ref": "#/$defs/loop"}}, "required": ["y"]},
        {"type": "array", "items": {"$ref": "#/$defs/loop"}, "minItems": 1},
        {"allOf": [{"type": "object"}, {"$ref": "#/$defs/loop"}]},
    ],
)
def test_a_schema_that_has_no_end_is_left_free(writer, loop):
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/loop"}}, "$defs": {"loop": loop}}
    assert held(writer, schema, ["f: a $ref leads back to itself without an end: it is left free"], x={"y": 1})


USUAL = {
    "type": "object",
    "description": "Search.",
    "properties": {
        "query": {"type": "string", "minLength": 1, "maxLength": 500, "description": "Words."},
        "kind": {"enum": ["noun", "verb"], "default": "noun"},
        "limits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "near": {
            "anyOf": [
                {"type": "object", "properties": {"km": {"type": "number"}}, "required": ["km"]},
                {"type": "null"},
            ]
        },
    },
    "required": ["query"],
    "additionalProperties": False,
}
ARGUMENTS = {"query": "a heron", "kind": "verb", "limits": [1, 2], "near": {"km": 1.5}}


def places(schema):
    """Yield each object of a schema, with the keys that it has."""
    if isinstance(schema, dict):
        yield schema
        for part in schema.values():
            yield from places(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from places(part)


KEYWORDS = [
    "required",
    "properties",
    "enum",
    "items",
    "type",
    "anyOf",
    "allOf",
    "minimum",
    "maxLength",
    "pattern",
    "$ref",
]
KEYWORDS += ["format", "additionalProperties", "description", "not", "if", "uniqueItems", "$defs", "title", "x-null"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_nulls_anywhere_are_as_good_as_nothing(writer, data):
    schema = copy.deepcopy(USUAL)
    for place in list(places(schema)):
        # A map of names to schemas has no keywords.
        if "query" not in place and "km" not in place:
            for key in data.draw(st.sets(st.sampled_from(KEYWORDS), max_size=4)):
                place.setdefault(key, None)
    assert held(writer, schema, **ARGUMENTS)
    assert not held(writer, schema, **ARGUMENTS | {"limits": [10]})


@pytest.mark.parametrize(
    "key", ["required", "properties", "enum", "items", "type", "anyOf", "minLength", "pattern", "$ref"]
)
def test_a_null_is_dropped_at_every_depth(writer, key):
    for schema in ({key: None}, {"type": "array", "items": {key: None}}, {"anyOf": [{key: None}, {"type": "null"}]}):
        assert writer.fits(parameter(schema), writer.call(x="[]"))
    assert writer.fits([tool({key: None})], writer.call())


@pytest.mark.parametrize(
    ("schema", "value", "warning"),
    [
        ({"type": "array", "uniqueItems": True}, [1, 1], "uniqueItems is not enforced"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, {"b": 1}, "propertyNames is not enforced"),
        ({"type": "object", "minProperties": 1}, {}, "minProperties is not enforced"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, {"a": 1}, "dependentRequired is not enforced"),
        ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1}, "if is not enforced"),
        ({"type": "array", "contains": {"type": "null"}}, [1], "contains is not enforced"),
        ({"type": "string", "not": {"const": "a"}}, "a", "not is not enforced"),
        ({"type": "string", "minLength": "5"}, "a", "minLength is ignored: it must be a number, not '5'"),
        (
            {"type": "string", "maxLength": -1},
            "a",
            "maxLength is ignored: it must be a positive integer or zero, not -1",
        ),
        ({"type": "whatever"}, [1], "there is no type 'whatever': it is ignored"),
        ({"type": "integer", "enum": ["a", "b"]}, 3, "enum is not enforced: none of its values fits the other rules"),
        ({"type": "array", "items": {"type": "null"}, "anyOf": "x"}, [None], "anyOf is ignored: it must be a list"),
        (
            {"oneOf": [{"type": "object"}, {"type": "object", "required": ["a"]}]},
            {"a": 1},
            "oneOf is enforced as anyOf",
        ),
    ],
)
def test_what_cannot_be_held_is_left_free(writer, schema, value, warning):
    assert writer.fits(parameter(schema), writer.call(x=json.dumps(value)), [f"f.x: {warning}"])
    with pytest.raises(ValueError, match=r"f\.x: .*strict"):
        writer.fits(parameter(schema, strict=True), writer.call(x=json.dumps(value)))
    # The next tool is held all the same.
    tools = [*parameter(schema), tool({"properties": {"n": {"type": "integer"}}, "required": ["n"]}, "g")]
    assert writer.fits(tools, writer.call("g", n="3"), [f"f.x: {warning}"])
    assert not writer.fits(tools, writer.call("g", n='"three"'), [f"f.x: {warning}"])


@pytest.mark.parametrize("kind", ["string", ["string", "integer"], "object"])
def test_a_const_that_was_left_out_does_not_hide_the_enum(writer, kind):
    """A null of another type than the value's is one that was left out; what stands beside it counts."""
    schema = {"type": kind, "const": None, "enum": ["a", {"a": 1}]}
    good, bad = ('{"a": 1}', '{"b": 1}') if kind == "object" else ('"a"', '"b"')
    assert writer.fits(parameter(schema), writer.call(x=good))
    assert not writer.fits(parameter(schema), writer.call(x=bad))
    empty = {"type": kind, "const": None, "enum": []}
    warning = "f.x: enum is not enforced: none of its values fits the other rules"
    assert writer.fits(parameter(empty), writer.call(x=good), [warning])


@pytest.mark.parametrize("kind", ["str", "text"])
def test_other_names_of_types_are_known(writer, kind):
    warning = f"f.x: there is no type {kind!r}: it is read as string"
    assert writer.fits(parameter({"type": kind}), writer.call(x='"12"'), [warning])


@pytest.mark.parametrize("name", ["uri-reference", "password", "int32", "iri", "binary", "path", "€", "idn-email"])
def test_a_format_is_an_annotation(writer, name):
    assert writer.takes({"type": "string", "format": name}, '"any text"')
    assert writer.fits(parameter({"type": "integer", "format": name}, strict=True), writer.call(x="3"))


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [("^[:|-]$", "|", "x"), ("^I?[0-9]+[:|-][0-9]+(?:;[0-9]+[:|-])*$", "I12|3;4:", "I12"), ("^a|b$", "xb", "xc")],
)
def test_a_valid_pattern_is_held(writer, pattern, good, bad):
    assert writer.takes({"type": "string", "pattern": pattern}, json.dumps(good))
    assert not writer.takes({"type": "string", "pattern": pattern}, json.dumps(bad))


@pytest.mark.parametrize("pattern", ["(?=a)b", "^(?!x).*$", "(a)\\1", "(", "\\bword\\b"])
def test_a_pattern_that_cannot_be_held_is_left_free(any_tokenizer, vocabulary, writer, pattern):
    constraint = constrain.constrained(
        any_tokenizer,
        tools=parameter({"type": "string", "pattern": pattern}),
        tool_choice="required",
        vocabulary=vocabulary,
    )
    assert len(constraint.warnings) == 1 and constraint.warnings[0].startswith(f"f.x: the pattern {pattern!r} is not")
    assert "\n" not in constraint.warnings[0]
    texts = [any_tokenizer.tool_call_start, writer.call(x='"any"'), any_tokenizer.tool_call_end]
    assert fits(constraint, any_tokenizer, *texts)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ("a text", "f"),
        (["a"], "f"),
        (7, "f"),
        ({"properties": {"x": "string"}}, r"f\.x"),
        ({"properties": {"x": {"items": 3}}}, r"f\.x\.items"),
        ({"properties": {"x": {"anyOf": [{}, "y"]}}}, r"f\.x\.anyOf\[1\]"),
        ({"properties": {"x": {"$ref": "#/$defs/y"}}, "$defs": {"y": "no"}}, r"f\.x\(#/\$defs/y\)"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(writer, schema, place):
    with pytest.raises(ValueError, match=f"^{place} is no schema: ") as caught:
        writer.fits([tool(schema)], "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [30, 40, 2000])
def test_a_deep_schema_is_held_to_a_depth(any_tokenizer, vocabulary, depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    chain = {"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(depth)} | {f"d{depth}": {}}}
    for each in (schema, {"$ref": "#/$defs/d0"}):
        parameters = {"type": "object", "properties": {"x": each}, **chain}
        constraint = constrain.constrained(any_tokenizer, tools=[tool(parameters)], vocabulary=vocabulary)
        # Each reference of the chain and its allOf count.
        assert len(constraint.warnings) == (depth > (30 if each is schema else 15))


def test_many_parameters_are_held(writer):
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(90)},
        "required": ["p80", "p3"],
    }
    assert held(writer, schema, p3=1, p80=2)
    assert not held(writer, schema, p80=2)
    assert not held(writer, schema, p3=1, p80="two")


@pytest.mark.parametrize("name", ["two words", "ключ", "a.b-c:d", "$x"])
def test_any_name_of_a_parameter_is_held(writer, name):
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    assert held(writer, schema, **{name: 3})
    assert not held(writer, schema, **{name: "three"})


def test_a_required_name_without_a_property_must_be_there(writer):
    assert held(writer, {"type": "object", "required": ["x"]}, x=1)
    assert not held(writer, {"type": "object", "required": ["x"]})
    closed = {"type": "object", "required": ["x"], "additionalProperties": False}
    assert held(writer, closed, ["f: 'x' is required, but not allowed: it is not enforced"])


def test_alternatives_of_all_parameters_are_held_one_by_one(writer):
    cat, dog = (
        {"properties": {"kind": {"const": kind}, "n": {"type": "integer"}}, "required": ["kind"]} for kind in "cd"
    )
    schema = {"type": "object", "properties": {"all": {"type": "boolean"}}, "oneOf": [cat, dog]}
    warnings = ["f: anyOf of all parameters together is not enforced"]
    assert held(writer, schema, warnings, kind="d", n=1, all=True)
    assert not held(writer, schema, warnings, kind="x")
    assert not held(writer, schema, warnings)
    whole = {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["n"]}], "$defs": {"a": cat}}
    assert held(writer, whole, kind="c", n=1)
    assert not held(writer, whole, kind="c")


@pytest.mark.parametrize("schema", [None, {}, True, [], {"type": "object", "properties": []}])
def test_a_tool_without_parameters_is_called(writer, schema):
    assert writer.fits([tool(schema)], writer.call())


def test_parameters_of_any_name_are_possible_where_the_schema_says_so(writer):
    assert held(writer, {"type": "object", "additionalProperties": {"type": "string"}}, any="text", other="text")
    assert held(writer, {"type": "string"}, ["f: the parameters are no object: they are left free"], any="text")


@pytest.mark.parametrize(
    ("schema", "arguments", "fault"),
    [
        ({"type": "array", "uniqueItems": True}, '{"x": [1, 1]}', "f.x: [1, 1] has non-unique elements"),
        ({"type": "string", "not": {"const": "a"}, "minLength": "5"}, '{"x": "a"}', "f.x: 'a' should not be valid"),
        ({"type": "str"}, "{}", "f: 'x' is a required property"),
        ({"type": "number", "maximum": None}, '{"x": 1e400}', None),
        ({"type": "string", "format": "uri", "pattern": "("}, '{"x": "no"}', None),
        ({"$ref": "#/nowhere"}, '{"x": 1}', "f: the call could not be checked: "),
        ({"type": "number", "multipleOf": 2}, '{"x": 1e400}', "f.x: inf is not a multiple of 2"),
    ],
)
def test_a_call_that_was_released_is_validated(schema, arguments, fault):
    found = constrain.validate_call({"function": {"name": "f", "arguments": arguments}}, parameter(schema))
    assert found is None if fault is None else found.startswith(fault) and "\n" not in found


def test_json_that_is_cut_or_unknown_is_a_fault():
    assert "could not be checked" in constrain.validate_call({"name": "f", "arguments": '{"x": '}, parameter({}))
    assert constrain.validate_call({"name": "g", "arguments": "{}"}, parameter({})) == "there is no tool 'g'"


@pytest.mark.parametrize(
    "schema",
    [{"type": "object", "uniqueItems": None, "minProperties": 1}, {"format": "nothing"}, False, True, None, {}],
)
def test_response_format_is_held_as_far_as_possible(xml_tokenizer, vocabulary, schema):
    constraint = constrain.json(xml_tokenizer, schema, vocabulary=vocabulary)
    assert fits(constraint, xml_tokenizer, "{}", "<|im_end|>")
    if constraint.warnings:
        with pytest.raises(ValueError, match="strict"):
            constrain.json(xml_tokenizer, schema, strict=True, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"^response_format is no schema"):
        constrain.json(xml_tokenizer, [1], vocabulary=vocabulary)
