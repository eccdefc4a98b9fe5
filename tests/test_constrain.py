"""Constrained calls and JSON, token by token, on the demo model's tokenizer."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools

from flashmoe_mlx import constrain

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


def test_an_unsupported_schema_is_named(tokenizer):
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "string", "pattern": "a"}}}}}
    with pytest.raises(ValueError, match=r"f\.x: pattern"):
        constrain.constrained(tokenizer, tools=[tool])
