"""Content, thoughts and tool calls of a text that arrives in parts."""

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools, mistral

from demo import MODEL
from demo.talk import TOOL
from flashmoe_mlx.constrain import constrained
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


MENTIONS = {
    "mentioned": "A <tool_call> would do, with </tool_call> after it.\n",
    "opened": "I begin with <tool_call>\n",
    "drafted": f"First {CALL.format('Rome')}? No: Oslo.\n",
    "drafted at its end": f"So: {CALL.format('Rome')}\n",
    "drafted twice": f"{CALL.format('Rome')}\n{CALL.format('Paris')}",
    "torn": "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo",
    "of nothing": "<tool_call></tool_call>",
    "a thought in a thought": f"<think>{CALL.format('Rome')}",
}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("thought", MENTIONS.values(), ids=MENTIONS)
def test_inside_a_thought_nothing_is_a_call(tokenizer: TokenizerWrapper, thought: str, size: int) -> None:
    after = f"</think>\n\nLet me see.\n{CALL.format('Oslo')}"
    for text, in_thought in ((thought + after, True), (f"<think>{thought}{after}", False)):
        delta = read(OutputParser(tokenizer, in_thought=in_thought, tools=[TOOL]), text, size)
        assert (delta.reasoning, delta.content) == (thought, "\n\nLet me see.\n")
        assert called(delta) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("style", ["xml", "json"])
@pytest.mark.parametrize(
    ("thought", "cities"),
    [
        ("Hm.{Oslo}", ["Oslo"]),
        ("{Oslo}\n{Rome}\n\n", ["Oslo", "Rome"]),
        ("A <tool_call> will do.\n{Oslo}", ["Oslo"]),
        ("{Oslo}? No: {Rome}", ["Rome"]),
        ("<tool_call>\n<function=get_weather>\n</tool_call>? No: {Rome}", ["Rome"]),
        ("{Oslo}? No.", []),
        ("{Oslo} <tool_call>", []),
        ("<tool_call>\n<function=get_weather>\n<parameter=city>\n{Oslo}", []),
        ("<tool_call>\n<function=fly>\n</function>\n</tool_call>", []),
    ],
)
def test_an_unclosed_thought_may_end_with_calls(
    tokenizer: TokenizerWrapper,
    monkeypatch: pytest.MonkeyPatch,
    thought: str,
    cities: list[str],
    style: str,
    size: int,
) -> None:
    """They are reasoning as well, because it is too late to take that back."""
    call = CALL
    if style == "json":
        monkeypatch.setattr(tokenizer, "_tool_parser", json_tools.parse_tool_call)
        call = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
    text = thought.replace("{Oslo}", call.format("Oslo")).replace("{Rome}", call.format("Rome"))
    parser = OutputParser(tokenizer, in_thought=True, tools=[TOOL])
    delta = read(parser, text, size)
    assert (delta.reasoning, delta.content) == (text, "")
    assert called(delta) == [("get_weather", {"city": city}) for city in cities]
    assert parser.called == bool(cities)
    assert read(OutputParser(tokenizer, in_thought=True), text, size) == Delta(reasoning=text)


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


@pytest.mark.parametrize("thought", MENTIONS.values(), ids=MENTIONS)
def test_the_constraint_holds_where_the_parser_sees_a_call(tokenizer: TokenizerWrapper, thought: str) -> None:
    """It allows any token in a thought, and only those of a call in a call."""
    processor = constrained(tokenizer, tools=[TOOL], thinking=True)
    parser = OutputParser(tokenizer, in_thought=True, tools=[TOOL])
    tokens = tokenizer.encode(f"{thought}</think>\n\nLet me see.\n{CALL.format('Oslo')}", add_special_tokens=False)
    logits, detokenizer = mx.zeros((1, len(tokenizer))), tokenizer.detokenizer
    delta = Delta()
    for position, token in enumerate(tokens):
        free = mx.isfinite(processor(mx.array([0, *tokens[:position]]), logits)).all().item()
        assert free == (parser._call is None or delta.tool_calls != [])
        detokenizer.add_token(token)
        delta += parser.feed(detokenizer.last_segment, position == len(tokens) - 1)
    assert called(delta) == [("get_weather", {"city": "Oslo"})]
