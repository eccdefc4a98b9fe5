"""Numbers arrive with the digits that the model wrote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx import constrain
from flashmoe_mlx.generation.output_parser import OutputParser
from tests.constrain.writing import parameter

NUMBERS = [
    "1234567890123456789",
    "18446744073709551616",
    "-9223372036854775809",
    "6.02e23",
    "1.5e-12",
    "0.1",
    "-0",
    "-0.0",
]
NUMBERS += ["1e400", "1E+5", "123456789.123456789012345", "1" * 100, "0.30000000000000004"]
DIGITS = st.text("0123456789", min_size=1, max_size=60).map(lambda digits: digits.lstrip("0") or "0")
INTEGERS = st.builds(str.__add__, st.sampled_from(["", "-"]), DIGITS)
FRACTIONS = st.just("") | st.text("0123456789", min_size=1, max_size=40).map(".{}".format)
EXPONENTS = st.just("") | st.builds(
    "{}{}{}".format, st.sampled_from("eE"), st.sampled_from(["", "+", "-"]), st.integers(0, 999)
)
DECIMALS = st.builds("{}{}{}".format, INTEGERS, FRACTIONS, EXPONENTS)
SHAPES = ["{}", "[{}]", '{{"y": [1, {}]}}']
TYPES = [{"type": "number"}, {"type": ["number", "null"]}, {"anyOf": [{"type": "number"}, {"type": "boolean"}]}]


def shaped(schema, shape):
    schema = schema if shape == "{}" else {"type": "array", "items": schema}
    return schema if "y" not in shape else {"type": "object", "properties": {"y": schema}}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_keeps_its_digits(writer, number, shape):
    for schema in TYPES:
        assert writer.takes(shaped(schema, shape), shape.format(number))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(number=DECIMALS, shape=st.sampled_from(SHAPES), schema=st.sampled_from(TYPES))
def test_any_number_keeps_its_digits(writer, number, shape, schema):
    assert writer.takes(shaped(schema, shape), shape.format(number))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(number=INTEGERS, schema=st.sampled_from([{"type": "integer"}, {"type": ["integer", "null"]}]))
def test_any_integer_keeps_its_digits(writer, number, schema):
    assert writer.takes(schema, number)


@pytest.mark.parametrize("number", ["1.5", "1e3", "01", "+1", "0x10", "NaN", "Infinity", "1.", ".5"])
def test_what_is_no_integer_cannot_be_written(writer, number):
    assert not writer.fits(parameter({"type": "integer"}), writer.call(x=number))


@pytest.mark.parametrize("digits", ["3" * 101, "0." + "3" * 101, "1e" + "3" * 101])
def test_a_number_ends_after_a_hundred_digits(writer, digits):
    assert not writer.fits(parameter({"type": "number"}), writer.call(x=digits))
    assert not writer.fits(parameter({"type": "array", "items": {"type": "number"}}), writer.call(x=f"[{digits}]"))


@pytest.mark.parametrize("schema", [{}, {"pattern": "^[0-9]*$"}, {"pattern": "^[0-9]{300}$"}, {"maxLength": 300}])
def test_a_text_has_any_number_of_digits(writer, schema):
    if not writer.is_xml or schema != {"pattern": "^[0-9]*$"}:
        assert writer.takes({"type": "string", **schema}, json.dumps("3" * 300))
    assert writer.takes({"type": "string"}, json.dumps("a" + "3" * 300))


def test_bounds_hold_for_large_integers(writer):
    schema = {"type": "integer", "minimum": 10}
    assert writer.takes(schema, "9" * 30)
    assert not writer.takes(schema, "9")
    assert not writer.takes({"type": "integer", "maximum": 10**12}, "1" + "0" * 11 + "1")


@pytest.mark.parametrize("bound", [{"maximum": 2**64}, {"minimum": -(2**63)}, {"maximum": 1e300}])
def test_bounds_that_are_too_large_are_left_free(writer, bound):
    (key,) = bound
    warnings = [f"f.x: {key} {bound[key]} is not enforced: it is too large"]
    assert writer.fits(parameter({"type": "integer", **bound}), writer.call(x="1" * 25), warnings)


@pytest.mark.parametrize("values", [[2**53, -(2**53)], [0.1, 1e-7, -1.5, 0], [12, 2.0**-20]])
def test_constants_keep_their_digits(writer, values):
    # Without exponents.
    written = {1e-7: "0.0000001", 2.0**-20: "0.00000095367431640625"}
    for value in values:
        assert writer.takes({"enum": values}, written.get(value, json.dumps(value)))
    assert not writer.takes({"enum": values}, "3")


@pytest.mark.parametrize("value", [1234567890123456789, -(2**63), 2**64, {"a": [-(2**65)]}, 1e300])
def test_constants_that_are_too_large_are_left_free(writer, value):
    warnings = ["f.x: const is not enforced: it has numbers beyond 2**53"]
    assert writer.fits(parameter({"const": value}), writer.call(x=json.dumps(value)), warnings)


@pytest.mark.parametrize("text", ["12", "1e400", "6.02e23"])
def test_a_number_in_a_text_stays_a_text(writer, text):
    assert writer.takes({"type": "string"}, json.dumps(text))


@pytest.mark.parametrize(
    ("written", "read"), [(" 12 ", "12"), ("True", "true"), ("[1, 'a']", '[1, "a"]'), ("twelve", '"twelve"')]
)
def test_a_call_that_is_not_held_is_read_all_the_same(xml_tokenizer, written, read):
    call = f"<function=f>\n<parameter=x>{written}</parameter></function>"
    (found,) = constrain.read_calls(xml_tokenizer, call, parameter({"type": ["integer", "boolean", "array"]}))
    assert found.arguments == f'{{"x": {read}}}'


@pytest.mark.parametrize("number", NUMBERS)
def test_a_client_gets_the_digits(any_tokenizer, writer, number):
    tools = parameter({"type": ["number", "null"]})
    text = f"{any_tokenizer.tool_call_start}{writer.call(x=number)}{any_tokenizer.tool_call_end}"
    (call,) = OutputParser(any_tokenizer, tools=tools).feed(text, last=True).tool_calls
    assert call["function"] == {"name": "f", "arguments": f'{{"x": {number}}}'}
