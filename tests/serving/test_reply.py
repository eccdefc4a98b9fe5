"""Answers as OpenAI's API shapes them, without a model."""

import json
from itertools import pairwise
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from demo import MODEL
from flashmoe_mlx.generation.job import Answer, Job, Token
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.reply import Reply
from flashmoe_mlx.serving.openai.request import read_request, thinking_options
from flashmoe_mlx.serving.openai.schema import ChatRequest
from tests.support.serving import DEFAULTS

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant\n{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}
{%- endif -%}"""


@pytest.fixture
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


@pytest.fixture
def thinker() -> TokenizerWrapper:
    return load_tokenizer(MODEL, {"chat_template": TEMPLATE})


def chat(**fields: Any) -> ChatRequest:
    fields = {"messages": [{"role": "user", "content": "What is a heron?"}]} | fields
    return read_request(ChatRequest, json.dumps(fields).encode(), DEFAULTS)


def test_reasoning_is_separate_from_content(thinker: TokenizerWrapper) -> None:
    request = chat(stream=True)
    made = Prompt.from_messages(request.conversation(), thinker)
    assert made.in_thought and thinker.decode(made.tokens).endswith("<think>\n")
    whole, parts = (Reply(request, Answer(Job(made, 9)), thinker, "demo") for _ in range(2))
    chunks = []
    for text in ("A", " bird", "</think>", "Bird", ""):
        for reply in (whole, parts):
            reply.add(Token(text, 70, -0.5, (), None if text else "stop"))
        chunks.append(parts.chunk())
    message = whole.whole()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Bird", "reasoning": "A bird"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk]
    assert deltas == [{"role": "assistant", "reasoning": "A"}, {"reasoning": " bird"}, {"content": "Bird"}, {}]


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
    request = chat(stream=True, logprobs=True, stop="!")
    reply = Reply(request, Answer(Job(Prompt([1]), 9)), tokenizer, "demo")
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
