"""Answers as OpenAI's API shapes them, without a model."""

import json
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from demo import MODEL
from flashmoe_mlx.constrain import vocabulary_of
from flashmoe_mlx.generation.job import Answer, Job, Token
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.reply import Reply
from flashmoe_mlx.serving.openai.request import read_request, thinking_options
from flashmoe_mlx.serving.openai.schema import ChatRequest
from tests.support.serving import DEFAULTS
from tests.support.thinking import TEMPLATE


@pytest.fixture
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


@pytest.fixture
def thinker() -> TokenizerWrapper:
    return load_tokenizer(MODEL, {"chat_template": TEMPLATE})


def chat(**fields: Any) -> ChatRequest:
    fields = {"messages": [{"role": "user", "content": "What is a heron?"}]} | fields
    return read_request(ChatRequest, json.dumps(fields).encode(), DEFAULTS)


def choice_of(request: ChatRequest, prompt: Prompt, tokenizer: TokenizerWrapper) -> Any:
    vocabulary = vocabulary_of(tokenizer)
    return Reply(request, [Answer(Job(prompt, 9))], tokenizer, vocabulary, "demo").choices[0]


def test_reasoning_is_separate_from_content(thinker: TokenizerWrapper) -> None:
    request = chat(stream=True)
    made = Prompt.from_messages(request.conversation(), thinker)
    assert made.in_thought and thinker.decode(made.tokens).endswith("<think>\n")
    whole, parts = (choice_of(request, made, thinker) for _ in range(2))
    chunks = [parts.start()]
    for text in ("A", " bird", "</think>", "Bird", ""):
        for choice in (whole, parts):
            choice.add(Token(text, 70, -0.5, (), None if text else "stop"))
        chunks.append(parts.chunk())
    message = whole.whole()["message"]
    assert message == {"role": "assistant", "content": "Bird", "reasoning": "A bird"}
    first, *deltas = [chunk["delta"] for chunk in chunks if chunk]
    assert first == {"role": "assistant", "content": ""}
    assert deltas == [{"reasoning": "A"}, {"reasoning": " bird"}, {"content": "Bird"}, {}]


def test_thinking_options_follow_the_request(thinker: TokenizerWrapper) -> None:
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert thinking_options(chat(**off), thinker) == {"enable_thinking": False}
    assert thinking_options(chat(), thinker) == {}
    assert thinking_options(chat(chat_template_kwargs={"enable_thinking": True}), thinker) == {"enable_thinking": True}
    with pytest.raises(ApiError, match="no reasoning levels"):
        thinking_options(chat(reasoning_effort="high"), thinker)


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


def test_chunks_add_up_to_the_whole(tokenizer: TokenizerWrapper) -> None:
    choice = choice_of(chat(stream=True, logprobs=True, stop="!"), Prompt([1]), tokenizer)
    chunks = []
    for text in ("A", "", " bird", "!", "?"):
        if choice.finish_reason is None:
            choice.add(Token(text, 70, -0.5, (), None))
            chunks.append(choice.chunk())
    chunks = [chunk for chunk in chunks if chunk]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "A bird"
    assert [chunk["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert sum(len(chunk["logprobs"]["content"]) for chunk in chunks) == 4
    assert choice.chunk() is None


@pytest.mark.parametrize("text", ["😀", "\u6f22 \u5b57", "caf\u00e9\n"])
def test_logprobs_have_the_bytes_of_parts_of_characters(tokenizer: TokenizerWrapper, text: str) -> None:
    choice = choice_of(chat(logprobs=True, top_logprobs=1), Prompt([1]), tokenizer)
    tokens = tokenizer.encode(text)
    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        choice.add(Token(text if last else "", token, -0.5, ((token, -0.5),), "length" if last else None))
    entries = choice.whole()["logprobs"]["content"]
    assert len(entries) == len(tokens)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in entries)
