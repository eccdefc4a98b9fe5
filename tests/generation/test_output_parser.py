"""Content, thoughts and tool calls of a text that arrives in parts."""

import json
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools, mistral

from demo import MODEL
from demo.talk import TOOL
from flashmoe_mlx.generation.output_parser import Delta, OutputParser

CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


def read(parser: OutputParser, text: str, size: int = 1) -> Delta:
    """Parse a text that arrives in parts of ``size`` characters."""
    whole = Delta()
    for begin in range(0, max(1, len(text)), size):
        delta = parser.feed(text[begin : begin + size], begin + size >= len(text))
        whole += delta
    return whole


def called(delta: Delta) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in delta.tool_calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_and_the_text_before_them_are_separated(tokenizer: TokenizerWrapper, size: int) -> None:
    text = "Let me see.\n" + CALL.format("Oslo") + "\n" + CALL.format("Rome") + "\n"
    delta = read(OutputParser(tokenizer, tools=[TOOL]), text, size)
    assert called(delta) == [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})]
    assert delta.content == "Let me see.\n"
    assert len({call["id"] for call in delta.tool_calls}) == 2


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "text",
    [
        CALL.format("Oslo").removesuffix("</tool_call>"),
        "<tool_call>\nget_weather(Oslo)\n</tool_call>\nDone.",
        "a <tool_ca",
        "1 < 2 <think",
        "",
    ],
    ids=["cut off", "malformed", "start of a marker", "start of another", "empty"],
)
def test_no_text_is_lost(tokenizer: TokenizerWrapper, text: str, size: int) -> None:
    assert read(OutputParser(tokenizer, tools=[TOOL]), text, size) == Delta(text)


def test_without_tools_a_call_is_content(tokenizer: TokenizerWrapper) -> None:
    assert read(OutputParser(tokenizer), f"So: {CALL}!") == Delta(f"So: {CALL}!")


@pytest.mark.parametrize("size", [1, 1000])
def test_text_between_calls_is_content(tokenizer: TokenizerWrapper, size: int) -> None:
    text = CALL.format("Oslo") + "\n\nand\n" + CALL.format("Rome")
    assert read(OutputParser(tokenizer, tools=[TOOL]), text, size).content == "\n\nand"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_thoughts_are_reasoning(tokenizer: TokenizerWrapper, size: int) -> None:
    delta = read(OutputParser(tokenizer, in_thought=True), "A bird?\n</think>\n\nA bird.", size)
    assert (delta.reasoning, delta.content) == ("A bird?\n", "\n\nA bird.")
    delta = read(OutputParser(tokenizer), "<think>Hm.</think>A bird.", size)
    assert (delta.reasoning, delta.content) == ("Hm.", "A bird.")
    delta = read(OutputParser(tokenizer, in_thought=True, tools=[TOOL]), "Hm." + CALL.format("Oslo"), size)
    assert delta.reasoning == "Hm." and called(delta) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_stops_end_content_only(tokenizer: TokenizerWrapper, size: int) -> None:
    parser = OutputParser(tokenizer, ["bird", "."], in_thought=True)
    delta = read(parser, "A bird.</think>A bi bird. More.", size)
    assert (delta.reasoning, delta.content) == ("A bird.", "A bi ") and parser.stopped
    assert read(OutputParser(None, ["</s>"]), "a </ s> b </", size).content == "a </ s> b </"


def test_calls_in_other_formats_are_parsed(tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_tool_parser", json_tools.parse_tool_call)
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert called(read(OutputParser(tokenizer, tools=[TOOL]), text)) == [("get_weather", {"city": "Oslo"})]
    monkeypatch.setattr(tokenizer, "_tool_parser", mistral.parse_tool_call)
    monkeypatch.setattr(tokenizer, "_tool_call_start", mistral.tool_call_start)
    monkeypatch.setattr(tokenizer, "_tool_call_end", mistral.tool_call_end)
    # It ends with the answer, without a marker.
    text = '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}'
    assert called(read(OutputParser(tokenizer, tools=[TOOL]), text)) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("kind", "written", "read_as"),
    [
        ({"type": "object"}, "{'in_stock': True}", {"in_stock": True}),
        ({"type": "object"}, '{"in_stock": true}', {"in_stock": True}),
        ({"type": "array"}, "['fiction', 'new']", ["fiction", "new"]),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, "123", "123"),
        ({"type": "string"}, "2025-06-15T10:30:00Z", "2025-06-15T10:30:00Z"),
        ({"type": "string"}, "version 3.10.5-beta", "version 3.10.5-beta"),
        ({"type": "integer"}, "12", 12),
    ],
)
def test_values_are_those_that_mlx_lm_reads(tokenizer: TokenizerWrapper, kind: Any, written: str, read_as: Any) -> None:
    """The cases are from mlx-lm's own tests of its parser."""
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": kind}}}}
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>\n</tool_call>"
    assert called(read(OutputParser(tokenizer, tools=[tool]), text)) == [("f", {"x": read_as})]
