"""Constrained calls and JSON, token by token, on the demo model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools, qwen3_coder

from flashmoe_mlx import constrain
from flashmoe_mlx.grammar import readable

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "count": {"type": "integer"},
                "kind": {"enum": ["noun", "verb"]},
            },
            "required": ["word"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path("demo/model"))


def accepts(processor, tokenizer, text: str) -> bool:
    """Whether every token of the text is allowed in its place."""
    width, past = len(tokenizer.get_vocab()) + 8, [0]
    for token in tokenizer.encode(text, add_special_tokens=False):
        if processor(mx.array(past), mx.zeros((1, width)))[0, token].item() != 0:
            return False
        past.append(token)
    return True


def call(body: str, name: str = "look") -> str:
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


WORD = "<parameter=word>\na heron\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (call(WORD), True),
        ("Let me see.\n" + call(WORD) + "\nand more " + call(WORD), True),
        (call(WORD + "<parameter=count>\n12\n</parameter>\n<parameter=kind>\nnoun\n</parameter>\n"), True),
        (call(WORD + "<parameter=count>\ntwo\n</parameter>\n"), False),
        (call(WORD + "<parameter=kind>\nadverb\n</parameter>\n"), False),
        (call(""), False),
        (call("<parameter=count>\n12\n</parameter>\n" + WORD), True),  # in any order
        (call(WORD + WORD), False),
        (call(WORD, "other"), False),
    ],
)
def test_a_call_fits_its_schema(tokenizer, text, fits):
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL]), tokenizer, text) is fits


@pytest.mark.parametrize(
    ("arguments", "fits"), [('{"word": "a"}', True), ('{"word":"a"}', True), ('{"count": 1}', False)]
)
def test_hermes_calls(tokenizer, monkeypatch, arguments, fits):
    monkeypatch.setattr(tokenizer, "_tool_parser", json_tools.parse_tool_call)
    text = f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL]), tokenizer, text) is fits


@pytest.mark.parametrize(("text", "fits"), [('{"n":3}', True), ('{"n":"x"}', False), ("Well", False)])
def test_json_from_the_first_token(tokenizer, text, fits):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert accepts(constrain.json(tokenizer, schema), tokenizer, text) is fits


def test_json_begins_after_thinking(tokenizer):
    for text, fits in [("free</think>\n\n{}", True), ("free</think>\n\nno", False)]:
        assert accepts(constrain.json(tokenizer, {"type": "object"}, thinking=True), tokenizer, text) is fits


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_must_come(tokenizer, choice):
    other = {"type": "function", "function": {"name": "other"}}
    for text, fits in [
        (call(WORD), True),
        ("\n" + call(WORD) + "\nand more", True),
        ("Well. " + call(WORD), False),
        (call("", "other"), choice == "required"),
    ]:
        processor = constrain.constrained(tokenizer, tools=[TOOL, other], tool_choice=choice)
        assert accepts(processor, tokenizer, text) is fits


def test_a_thought_is_free(tokenizer):
    for choice in ("auto", "required"):
        for text, fits in [
            ("as <tool_call> in" + "</think>\n\n" + call(WORD), True),
            ("</think>\n\n" + call(""), False),
            ("</think>\n\nWell." + call(WORD), choice == "auto"),
        ]:
            processor = constrain.constrained(tokenizer, tools=[TOOL], tool_choice=choice, thinking=True)
            assert accepts(processor, tokenizer, text) is fits


def test_free_text_is_not_touched(tokenizer):
    """The very array comes back: nothing is computed."""
    processor = constrain.constrained(tokenizer, tools=[TOOL])
    logits = mx.zeros((1, 8))
    assert all(processor(mx.array([token]), logits) is logits for token in range(5))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"enum": ["null"]}, r"f\.x: no call can carry the text null"),
        ({"$ref": "#/nowhere"}, "#/nowhere"),
        ({"type": "object", "properties": {"</tool_call>": {}}}, r"f\.x: .*ends a call"),
    ],
)
def test_an_unsupported_schema_is_one_line(tokenizer, schema, message):
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}}
    with pytest.raises(ValueError, match=message) as caught:
        constrain.constrained(tokenizer, tools=[tool])
    assert "\n" not in str(caught.value)


TEXTS = st.sampled_from(["noun", "null", "12", "true", "a b", '"', "[1]", "<b>", "né"])
PLAIN = st.one_of(
    st.just({"type": "string"}),
    st.builds(lambda low: {"type": "string", "minLength": low, "maxLength": low + 2}, st.integers(0, 3)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]+$"}, {"type": "string", "pattern": "[aeiou]"}]),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "string", "format": "uri-reference"}]),
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {}]),
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 9}, st.integers(-20, 2000)),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-3, 3)),
    st.builds(lambda choices: {"enum": ["other", *choices]}, st.lists(st.one_of(TEXTS, st.integers(0, 9)), max_size=3)),
    st.builds(lambda value: {"const": value}, st.one_of(st.integers(0, 99), st.just("so"), st.booleans())),
    st.just({"type": ["string", "null"]}),
    st.just({"$ref": "#/$defs/pair"}),
)


def _deeper(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(lambda a, b: {"anyOf": [a, b, {"type": "null"}]}, inner, inner),
        st.builds(lambda a, b: _object({"a": a, "the b": b}, ["a"]), inner, inner),
        st.just({"type": "object", "additionalProperties": {"type": "integer"}}),
    )


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


PARAMETERS = st.dictionaries(
    st.sampled_from(["word", "count", "the_kind", "x-y"]), st.recursive(PLAIN, _deeper, max_leaves=4)
)


def speak(processor: constrain.Processor, tokenizer: TokenizerWrapper, seed: int) -> str:
    """What a model says that wants anything, and after a while an end of its call, until it has ended."""
    rng = np.random.default_rng(seed)
    width = len(tokenizer.get_vocab()) + 8
    ends = [tokenizer.encode(end, add_special_tokens=False) for end in ("\n</parameter>\n</function>\n", *'"}]\n')]
    closer = tokenizer.encode("</tool_call>", add_special_tokens=False)[-1]
    past = [0]
    for step in range(1000):
        logits = rng.normal(size=(1, width)).astype(np.float32)
        logits[0, closer] += step
        for end in ends:
            said = max(n for n in range(len(end)) if past[len(past) - n :] == end[:n])
            logits[0, end[said]] += step * (1 + said) / 8  # what it has begun it likes to end
        token = int(processor(mx.array(past[-1:]), mx.array(logits)).argmax(-1).item())
        past.append(token)
        if token == closer:
            return str(tokenizer.decode(past[1:]))
    raise AssertionError(f"no end of {tokenizer.decode(past[1:])[:300]}")


def check_random_calls(tokenizer: TokenizerWrapper, style: Any, examples: int) -> None:
    vocabulary = constrain.vocabulary_of(tokenizer)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(PARAMETERS, st.data(), st.integers(0, 2**32))
    def check(properties: dict[str, Any], data: st.DataObject, seed: int) -> None:
        required = data.draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        schema = _object(properties, required) | {"$defs": {"pair": _object({"n": {"type": "integer"}}, ["n"])}}
        tools = [TOOL, {"type": "function", "function": {"name": "f", "parameters": schema}}]
        choice = {"type": "function", "function": {"name": "f"}}
        processor = constrain.constrained(tokenizer, tools=tools, tool_choice=choice, vocabulary=vocabulary)
        text = speak(processor, tokenizer, seed).strip()
        inner = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
        assert "</tool_call>" not in inner
        found = style.parse_tool_call(inner.strip(), readable(tools))
        assert found["name"] == "f"
        jsonschema.validate(found["arguments"], schema)
        json.dumps(found["arguments"], allow_nan=False)

    check()


@pytest.mark.parametrize("style", [qwen3_coder, json_tools])
def test_any_call_parses_and_fits(tokenizer, monkeypatch, style):
    monkeypatch.setattr(tokenizer, "_tool_parser", style.parse_tool_call)
    check_random_calls(tokenizer, style, 60)


@pytest.mark.soak
@pytest.mark.parametrize("style", [qwen3_coder, json_tools])
def test_any_of_many_calls_parses_and_fits(tokenizer, monkeypatch, style):
    monkeypatch.setattr(tokenizer, "_tool_parser", style.parse_tool_call)
    check_random_calls(tokenizer, style, 3000)
