"""Texts of any length, under any bound and with any tag in them, are written and come back as they were."""

import json

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx import constrain
from flashmoe_mlx.constrain.parameter import escape, unescape
from tests.constrain.writing import fits, parameter

PROSE = "the quick brown fox jumps over the lazy dog, "
TAGS = [
    "</parameter>",
    "\n</parameter>\n",
    "</tool_call>",
    "</function>",
    "<parameter=x>\n",
    "<\\/parameter>",
    "\\",
    "<",
]
TAGS += [
    "<\\\\/tool_call>",
    "<tool_call>",
    "null",
    "[",
    "{",
    "12",
    '"',
    "\n",
    "é",
    "🙂",
    "</think>",
    "1e400",
    "\\ud800",
]
TEXTS = st.lists(st.sampled_from([*TAGS, PROSE, "a", " ", "\n"]), max_size=12).map("".join)


def text(length: int) -> str:
    return (PROSE * (length // len(PROSE) + 1))[:length]


@pytest.mark.parametrize("most", [50, 80, 200, 256, 257, 4000])
def test_a_text_is_as_long_as_maxlength_allows(writer, most):
    schema = {"type": "string", "maxLength": most}
    assert writer.takes(schema, json.dumps(text(most)))
    assert not writer.takes(schema, json.dumps(text(most + 1)))


@pytest.mark.parametrize("least", [1, 30, 255, 300, 5000])
def test_a_text_is_as_long_as_minlength_asks(writer, least):
    schema = {"type": "string", "minLength": least}
    assert writer.takes(schema, json.dumps(text(least)))
    assert not writer.takes(schema, json.dumps(text(least - 1)))


@pytest.mark.soak
@pytest.mark.parametrize("schema", [{"maxLength": 524288}, {}, {"minLength": 1000, "maxLength": 200000}])
def test_a_text_of_a_hundred_thousand_characters_is_held(writer, schema):
    assert writer.takes({"type": "string", **schema}, json.dumps(text(100000)))


def test_a_text_may_be_far_from_its_bound(writer):
    assert writer.takes({"type": "string", "maxLength": 524288}, json.dumps(text(9000)))


@pytest.mark.parametrize("pattern", ["^[a-z ,]+$", "fox.*dog", "^the|^a"])
@pytest.mark.parametrize(("least", "most"), [(0, 300), (100, 200), (300, 524288)])
def test_a_text_has_a_length_and_a_pattern(writer, pattern, least, most):
    schema = {"type": "string", "pattern": pattern, "minLength": least, "maxLength": most}
    assert writer.takes(schema, json.dumps(text(max(150, least))))
    assert not writer.takes(schema, json.dumps(text(max(150, least)).upper()))
    for length in {max(least - 1, 0), most + 1} - {0, 524289}:
        assert not writer.takes(schema, json.dumps(text(length)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"], "maxLength": 5000},
        {"anyOf": [{"type": "string", "minLength": 400}, {"type": "array", "items": {"type": "integer"}}]},
        {"type": ["string", "integer"], "maximum": 5, "maxLength": 400},
    ],
)
def test_a_text_that_may_be_something_else_has_a_length(writer, schema):
    assert writer.takes(schema, json.dumps(text(400)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(body=TEXTS, more=st.integers(0, 3), bound=st.sampled_from(["maxLength", "minLength"]), repeat=st.integers(1, 40))
def test_any_text_comes_back_under_any_bound(writer, body, more, bound, repeat):
    body *= repeat
    if bound == "maxLength":
        # In an XML-style call, an escape has one character more.
        more += len(escape(body)) - len(body)
        assert writer.takes({"type": "string", "maxLength": len(body) + more}, json.dumps(body))
    elif escape(body) == body or not writer.is_xml:
        assert writer.takes({"type": "string", "minLength": max(len(body) - more, 0)}, json.dumps(body))


@given(body=TEXTS)
def test_every_text_has_an_escape(body):
    assert unescape(escape(body)) == body
    assert "\n</parameter>\n" not in escape(body) and "</tool_call>" not in escape(body)


@pytest.mark.parametrize("value", ['"null"', '"12"', '"[1, 2]"', '"true"', '"{"', '""', '"  "', '"\\n"'])
def test_a_text_that_looks_like_something_else_is_a_text(writer, value):
    assert writer.takes({"type": "string"}, value)


def test_response_format_has_long_texts(xml_tokenizer, vocabulary):
    for schema in ({"maxLength": 9000}, {"minLength": 5000}, {"minLength": 5000, "pattern": "fox", "maxLength": 9000}):
        for length, held in ((6000, True), (4999, "minLength" not in schema), (9001, "maxLength" not in schema)):
            constraint = constrain.json(xml_tokenizer, {"type": "string", **schema}, vocabulary=vocabulary)
            assert fits(constraint, xml_tokenizer, json.dumps(text(length)), "<|im_end|>") is held


@pytest.mark.parametrize("limits", [{"max_lexer_states": 200}, {"step_lexer_fuel": 1}, {"max_items_in_row": 1}])
def test_a_matcher_that_fails_releases_the_call(monkeypatch, caplog, any_tokenizer, vocabulary, writer, limits):
    monkeypatch.setattr(
        "flashmoe_mlx.constrain.constraint._LIMITS", llguidance.LLParserLimits(precompute_large_lexemes=False, **limits)
    )
    tools = parameter({"type": "string", "minLength": 300})
    constraint = constrain.constrained(any_tokenizer, tools=tools, tool_choice="required", vocabulary=vocabulary)
    start, end = any_tokenizer.tool_call_start, any_tokenizer.tool_call_end
    assert fits(constraint, any_tokenizer, start, writer.call(x=json.dumps(text(900))), end, "Free <text>.")
    assert len(constraint.warnings) == 1 and "not held to its schema to the end" in constraint.warnings[0]
    assert constraint.warnings[0] in caplog.text
