"""Calls read while they are written: the pieces are the arguments, wherever the text is cut."""

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import qwen3_coder

from demo import MODEL
from flashmoe_mlx.constrain import read_calls
from flashmoe_mlx.constrain.call import whole_characters
from flashmoe_mlx.constrain.parameter import END, escape
from flashmoe_mlx.generation.call_stream import CallPart, CallStream
from flashmoe_mlx.generation.output_parser import Delta, OutputParser

TYPES: dict[str, Any] = {
    "text": {"type": "string"},
    "note": {"type": ["string", "null"]},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "sure": {"type": "boolean"},
    "none": {"type": "null"},
    "list": {"type": "array"},
    "map": {"type": "object"},
    "some": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "mixed": {"anyOf": [{"type": "string"}, {"type": "object"}]},
    "free": {},
    "enum": {"enum": ["a", 1, None, "null", "2"]},
    "maybe": {"type": ["string", "boolean", "number"]},
}
PARAMETERS = {"type": "object", "properties": TYPES}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]

texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(
        ["", "\n", "nu", "nullable", "\n</param", "</parameter", "<tool_call>", 'a "b" \\ c', "\U0001f600", "\t\x00"]
    ),
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(allow_nan=False, allow_infinity=False), texts
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
# Texts of values, as a model may write them.
written = st.one_of(
    texts.filter(lambda text: END not in f"\n{text}\n"),
    values.map(json.dumps),
    st.sampled_from(
        ["null", "nul", " null ", "n", "true", "t", "12", "-1.50", "1 2", '"a"', "a", "2", " [1]", "{", " "]
    ),
)
ESCAPES = ["\\ud83d", "\\ude00", "\\uD83D\\uDE00", "\\\\", '\\"', "\\n", "\\u00e9", "\\udead"]
cuts = st.lists(st.integers(0, 400), max_size=30)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[a:b] for a, b in pairwise(places)]


def read(stream: CallStream, parts: list[str]) -> list[CallPart]:
    return [part for text in parts for part in stream.feed(text)]


def check(parts: list[CallPart], stream: CallStream) -> Any:
    """Check the form of the parts, and return the arguments."""
    assert stream.complete and parts[0].name == "f" and not any(part.name for part in parts[1:])
    assert len({part.id for part in parts}) == 1
    assert "".join(part.arguments for part in parts) == stream.arguments
    return json.loads(stream.arguments)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(texts, values, max_size=4), cuts, st.sampled_from([(", ", ": "), (",", ":")]), st.booleans())
def test_arguments_of_a_json_call_arrive_as_written(
    arguments: dict[str, Any], cuts: list[int], separators: tuple[str, str], is_ascii: bool
) -> None:
    written = json.dumps(arguments, separators=separators, ensure_ascii=is_ascii)
    stream = CallStream(TOOLS)
    parts = read(stream, pieces(f'\n{{"name": "f", "arguments": {written}}}\n', cuts))
    assert check(parts, stream) == arguments and stream.arguments == written


@pytest.mark.parametrize("number", ["6.02e23", "1.5e-12", "1234567890123456789", "-0.10", "18446744073709551616"])
@pytest.mark.parametrize("style", ["json", "xml"])
def test_numbers_arrive_as_written(number: str, style: str) -> None:
    if style == "json":
        stream = CallStream(TOOLS)
        read(stream, list(f'{{"name": "f", "arguments": {{"share": {number}}}}}'))
    else:
        stream = CallStream(TOOLS)
        read(stream, list(f"\n<function=f>\n<parameter=share>\n{number}\n</parameter>\n</function>\n"))
    assert stream.complete and stream.arguments == f'{{"share": {number}}}'


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(TYPES)), written), unique_by=lambda pair: pair[0]), cuts)
def test_the_pieces_of_an_xml_call_are_what_the_reader_of_whole_calls_finds(
    arguments: list[tuple[str, str]], cuts: list[int]
) -> None:
    text = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    text = f"\n<function=f>\n{text}</function>\n"
    stream = CallStream(TOOLS)
    check(read(stream, pieces(text, cuts)), stream)
    reader = SimpleNamespace(tool_parser=qwen3_coder.parse_tool_call)
    assert stream.arguments == read_calls(reader, text, TOOLS)[0].arguments


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*ESCAPES, *"ab {}[],:"]), max_size=12), cuts)
def test_escapes_of_a_json_call_are_never_cut(escapes: list[str], cuts: list[int]) -> None:
    arguments = f'{{"text": "{"".join(escapes)}"}}'
    text = f'\n{{"name": "f", "arguments": {arguments}}}\n'
    stream = CallStream(TOOLS)
    parts = read(stream, pieces(text, cuts))
    check(parts, stream)["text"].encode()
    assert stream.arguments == whole_characters(arguments)
    read(again := CallStream(TOOLS), list(text))
    assert again.arguments == stream.arguments


@settings(max_examples=50, deadline=None)
@given(texts, cuts)
def test_a_text_with_closing_tags_arrives_as_it_was_meant(text: str, cuts: list[int]) -> None:
    for tag in ("</parameter>", "</tool_call>", "<\\/parameter>", "\n</parameter>\n"):
        whole = f"{text}{tag}{text}"
        stream = CallStream(TOOLS)
        call = f"\n<function=f>\n<parameter=text>\n{escape(whole)}\n</parameter>\n</function>\n"
        assert check(read(stream, pieces(call, cuts)), stream) == {"text": whole}


def test_a_text_is_not_held_back() -> None:
    stream = CallStream(TOOLS)
    read(stream, ["\n<function=f>\n<parameter=text>\n"])
    for word in ("class", " Heron:", "\n    ", '"""A bird."""', "\n", "\n"):
        before = stream.arguments
        read(stream, [word])
        # A line break may begin the closing tag.
        assert len(stream.arguments) > len(before) or word.endswith("\n")
    read(stream, ["x"])
    assert json.loads(stream.arguments + '"}') == {"text": 'class Heron:\n    """A bird."""\n\nx'}


@pytest.mark.parametrize("size", [1, 3, 17])
@pytest.mark.parametrize("length", [100, 100_000])
def test_a_long_text_is_read_in_time(size: int, length: int) -> None:
    text = ('heron "bird"\n' * (length // 13 + 1))[:length]
    stream = CallStream(TOOLS)
    call = f"\n<function=f>\n<parameter=text>\n{text}\n</parameter>\n</function>\n"
    parts = read(stream, [call[start : start + size] for start in range(0, len(call), size)])
    assert check(parts, stream) == {"text": text}


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


CALL = "<tool_call>\n<function=f>\n<parameter=text>\n{}\n</parameter>\n</function>\n</tool_call>"


def parse(tokenizer: TokenizerWrapper, text: str, size: int, certain: Any = lambda: True) -> Delta:
    parser = OutputParser(tokenizer, tools=TOOLS, certain=certain)
    whole = Delta()
    for start in range(0, len(text), size):
        whole += parser.feed(text[start : start + size], start + size >= len(text))
    return whole


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("texts", [["a"], ["a", 'b "c"'], ["", "\n", "\u00e9\U0001f600"]])
def test_pieces_of_an_answer_are_its_calls(tokenizer: TokenizerWrapper, texts: list[str], size: int) -> None:
    whole = parse(tokenizer, "So:\n" + "\n".join(CALL.format(text) for text in texts), size)
    assert [json.loads(call["function"]["arguments"]) for call in whole.tool_calls] == [
        {"text": text} for text in texts
    ]
    for call in whole.tool_calls:
        parts = [part for part in whole.call_parts if part.id == call["id"]]
        assert "".join(part.arguments for part in parts) == call["function"]["arguments"]
        assert [part.name for part in parts if part.name] == ["f"]
    assert not whole.torn and whole.content.strip() == "So:"


@pytest.mark.parametrize("end", [30, 50, 60])
def test_a_call_that_is_cut_off_is_torn_and_no_call(tokenizer: TokenizerWrapper, end: int) -> None:
    text = CALL.format("a heron")[:end]
    whole = parse(tokenizer, text, 1)
    assert whole.torn == text and not whole.tool_calls and not whole.content
    assert '{"text": "a heron"}'.startswith("".join(part.arguments for part in whole.call_parts))


@pytest.mark.parametrize("text", ["{'a': 1}", "}{", '{"text": heron}'])
def test_a_released_json_call_that_is_not_json_is_no_call(text: str) -> None:
    stream = CallStream(TOOLS)
    read(stream, [f'{{"name": "f", "arguments": {text}}}'])
    assert stream.finish([], "") == [] and stream.finish([{"function": {"name": "f", "arguments": "{}"}}], "") == []


@pytest.mark.parametrize("after", range(20, 80, 6))
def test_a_call_whose_constraint_is_released_is_still_one(tokenizer: TokenizerWrapper, after: int) -> None:
    text = CALL.format("a grey heron")
    fed = iter(range(10**6))
    whole = parse(tokenizer, text, 1, certain=lambda: next(fed) < after)
    assert [json.loads(call["function"]["arguments"]) for call in whole.tool_calls] == [{"text": "a grey heron"}]
    assert "".join(part.arguments for part in whole.call_parts) in ("", whole.tool_calls[0]["function"]["arguments"])
