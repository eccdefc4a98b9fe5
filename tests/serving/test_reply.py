"""Prompts and answers without a model: what a template makes of a conversation, and what is told of a text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools, mistral

from demo.talk import TOOL
from demo import MODEL
from flashmoe_mlx.generation import prompt
from flashmoe_mlx.generation.job import Generation, Order, Token
from flashmoe_mlx.generation.output_parser import Piece, Pieces
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.serving.errors import Refusal
from flashmoe_mlx.serving.openai.reply import Reply
from flashmoe_mlx.serving.openai.request import read_request
from flashmoe_mlx.serving.openai.schema import ChatRequest
from tests.support.serving import DEFAULTS

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant\n{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}
{%- endif -%}"""
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


@pytest.fixture
def thinker() -> TokenizerWrapper:
    return load_tokenizer(MODEL, {"chat_template": TEMPLATE})


def chat(**fields: Any) -> ChatRequest:
    fields = {"messages": [{"role": "user", "content": "What is a heron?"}]} | fields
    return read_request(ChatRequest, json.dumps(fields).encode(), DEFAULTS)


def read(pieces: Pieces, text: str, size: int = 1) -> Piece:
    """What becomes of a text that arrives in parts of some characters."""
    whole = Piece()
    for begin in range(0, max(1, len(text)), size):
        piece = pieces.read(text[begin : begin + size], begin + size >= len(text))
        whole.content += piece.content
        whole.reasoning += piece.reasoning
        whole.tool_calls += piece.tool_calls
    return whole


def called(piece: Piece) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in piece.tool_calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_parallel_calls(tokenizer: TokenizerWrapper, size: int) -> None:
    text = "Let me see.\n" + CALL.format("Oslo") + "\n" + CALL.format("Rome") + "\n"
    piece = read(Pieces(tokenizer, tools=[TOOL]), text, size)
    assert called(piece) == [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})]
    assert piece.content == "Let me see.\n"
    assert len({call["id"] for call in piece.tool_calls}) == 2


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "text",
    [
        CALL.format("Oslo").removesuffix("</tool_call>"),  # the answer was too long
        "<tool_call>\nget_weather(Oslo)\n</tool_call>\nDone.",  # no call
        "a <tool_ca",  # the beginning of a mark
        "1 < 2 <think",
        "",
    ],
)
def test_no_text_is_lost(tokenizer: TokenizerWrapper, text: str, size: int) -> None:
    assert read(Pieces(tokenizer, tools=[TOOL]), text, size) == Piece(text)


def test_without_tools_a_call_is_text(tokenizer: TokenizerWrapper) -> None:
    assert read(Pieces(tokenizer), f"So: {CALL}!") == Piece(f"So: {CALL}!")


@pytest.mark.parametrize("size", [1, 1000])
def test_text_between_calls_is_told(tokenizer: TokenizerWrapper, size: int) -> None:
    text = CALL.format("Oslo") + "\n\nand\n" + CALL.format("Rome")
    assert read(Pieces(tokenizer, tools=[TOOL]), text, size).content == "\n\nand"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_thoughts(tokenizer: TokenizerWrapper, size: int) -> None:
    piece = read(Pieces(tokenizer, thinks=True), "A bird?\n</think>\n\nA bird.", size)
    assert (piece.reasoning, piece.content) == ("A bird?\n", "\n\nA bird.")
    piece = read(Pieces(tokenizer), "<think>Hm.</think>A bird.", size)
    assert (piece.reasoning, piece.content) == ("Hm.", "A bird.")
    piece = read(Pieces(tokenizer, thinks=True, tools=[TOOL]), "Hm." + CALL.format("Oslo"), size)
    assert piece.reasoning == "Hm." and called(piece) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_stops_end_content_only(tokenizer: TokenizerWrapper, size: int) -> None:
    pieces = Pieces(tokenizer, ["bird", "."], thinks=True)
    piece = read(pieces, "A bird.</think>A bi bird. More.", size)
    assert (piece.reasoning, piece.content) == ("A bird.", "A bi ") and pieces.stopped
    assert read(Pieces(None, ["</s>"]), "a </ s> b </", size).content == "a </ s> b </"


def test_other_formats_of_calls(tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_tool_parser", json_tools.parse_tool_call)
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert called(read(Pieces(tokenizer, tools=[TOOL]), text)) == [("get_weather", {"city": "Oslo"})]
    monkeypatch.setattr(tokenizer, "_tool_parser", mistral.parse_tool_call)
    monkeypatch.setattr(tokenizer, "_tool_call_start", mistral.tool_call_start)
    monkeypatch.setattr(tokenizer, "_tool_call_end", mistral.tool_call_end)
    text = '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}'  # ends with the answer, without a mark
    assert called(read(Pieces(tokenizer, tools=[TOOL]), text)) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("kind", "written", "read_as"),
    [
        ({"type": "object"}, "{'in_stock': True}", {"in_stock": True}),  # Python's style
        ({"type": "object"}, '{"in_stock": true}', {"in_stock": True}),
        ({"type": "array"}, "['fiction', 'new']", ["fiction", "new"]),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, "123", "123"),
        ({"type": "string"}, "2025-06-15T10:30:00Z", "2025-06-15T10:30:00Z"),
        ({"type": "string"}, "version 3.10.5-beta", "version 3.10.5-beta"),
        ({"type": "integer"}, "12", 12),
    ],
)
def test_values_as_mlx_lm_reads_them(tokenizer: TokenizerWrapper, kind: Any, written: str, read_as: Any) -> None:
    """mlx-lm's own tests of its parser ask these."""
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": kind}}}}
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>\n</tool_call>"
    assert called(read(Pieces(tokenizer, tools=[tool]), text)) == [("f", {"x": read_as})]


def test_a_thought_is_told_apart(thinker: TokenizerWrapper) -> None:
    request = chat(stream=True)
    made = Prompt.of_chat(request, thinker, {})
    assert made.thinks and thinker.decode(made.tokens).endswith("<think>\n")
    whole, parts = (Reply(request, made, Generation(Order(made.tokens, 9)), thinker, "demo") for _ in range(2))
    chunks = []
    for text in ("A", " bird", "</think>", "Bird", ""):
        for reply in (whole, parts):
            reply.add(Token(text, 70, -0.5, (), None if text else "stop"))
        chunks.append(parts.chunk())
    message = whole.whole()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Bird", "reasoning": "A bird"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk]
    assert deltas == [{"role": "assistant", "reasoning": "A"}, {"reasoning": " bird"}, {"content": "Bird"}, {}]


def test_thinking_on_and_off(thinker: TokenizerWrapper) -> None:
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert not Prompt.of_chat(chat(**off), thinker, {}).thinks
    assert not Prompt.of_chat(chat(), thinker, {"enable_thinking": False}).thinks
    on = chat(chat_template_kwargs={"enable_thinking": True})
    assert Prompt.of_chat(on, thinker, {"enable_thinking": False}).thinks
    with pytest.raises(Refusal, match="no degrees"):
        Prompt.of_chat(chat(reasoning_effort="high"), thinker, {})


def test_where_other_prompts_may_begin(thinker: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the system message, and before the answer: what comes next begins with the same tokens."""
    monkeypatch.setattr(prompt, "_CHUNK", 1)
    system = {"role": "system", "content": "You are a pocket dictionary."}
    turns = [system, {"role": "user", "content": "What is a heron?"}]
    first = Prompt.of_chat(chat(messages=turns), thinker, {})
    other = Prompt.of_chat(chat(messages=[system, {"role": "user", "content": "Define a sofa."}]), thinker, {})
    turns += [{"role": "assistant", "content": "A bird."}, {"role": "user", "content": "Which?"}]
    then = Prompt.of_chat(chat(messages=turns), thinker, {})
    after_system, before_answer = first.beginnings
    assert first.tokens[:after_system] == other.tokens[:after_system] and after_system in other.beginnings
    assert first.tokens[:before_answer] == then.tokens[:before_answer]
    assert first.tokens[: before_answer + 1] != then.tokens[: before_answer + 1]


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in "abc"]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": name, "content": name} for name in "cab"),
        {"role": "assistant", "content": "!"},
    ]
    said = [message["content"] for message in chat(messages=messages).conversation()]
    assert said == ["?", "", "a", "b", "c", "!"]


def test_chunks_are_the_whole(tokenizer: TokenizerWrapper) -> None:
    request = chat(stream=True, logprobs=True, stop="!")
    reply = Reply(request, Prompt([1]), Generation(Order([1], 9)), tokenizer, "demo")
    chunks = []
    for text in ("A", "", " bird", "!", "?"):
        if not reply.finished:
            reply.add(Token(text, 70, -0.5, (), None))
            chunks.append(reply.chunk())
    choices = [chunk["choices"][0] for chunk in chunks if chunk]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "A bird"
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert sum(len(choice["logprobs"]["content"]) for choice in choices) == 4
    assert all(one and other and one["id"] == other["id"] for one, other in pairwise(filter(None, chunks)))
