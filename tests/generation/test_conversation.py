"""Answers of a conversation, and how much of each prompt is computed for them."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from flashmoe_mlx.generation.conversation import Conversation
from flashmoe_mlx.generation.fitted_messages import Message
from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.generation.prompt import Prompt
from tests.conftest import WriteFamily
from tests.support.oracle import resident, streamed

HERON: Message = {"role": "user", "content": "What is a heron?"}
CRANE: Message = {"role": "user", "content": "What is a crane?"}


@pytest.fixture
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


@pytest.fixture
def forgetful(tokenizer: TokenizerWrapper) -> TokenizerWrapper:
    """A tokenizer whose template drops the empty thoughts from earlier answers."""
    thought, kept = "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}", "'<|im_start|>assistant\\n' -}}"
    assert tokenizer.chat_template.count(thought) == 2
    tokenizer.chat_template = tokenizer.chat_template.replace(thought, kept, 1)
    return tokenizer


def converse(tokenizer: TokenizerWrapper, *options: Any) -> Conversation:
    model: nn.Module = streamed(MODEL)
    return Conversation(Generator(model, tokenizer, PrefixCache(max_entries=2)), *options)


def ask(conversation: Conversation, message: Message) -> str:
    conversation.messages.append(message)
    return "".join(delta.content for delta in conversation.answer(8))


def computed(conversation: Conversation) -> int:
    """Tokens of the last prompt that were not cached."""
    assert conversation.last_response
    return conversation.last_response.prompt_tokens


def expected(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> str:
    """mlx-lm's own answer, without any cached state."""
    prompt = Prompt.from_messages(messages, tokenizer).tokens
    text: str = mlx_lm.generate(resident(MODEL), tokenizer, prompt, max_tokens=8)
    return text


def test_only_new_tokens_are_computed_and_answers_do_not_depend_on_it(tokenizer: TokenizerWrapper) -> None:
    conversation = converse(tokenizer)
    ask(conversation, HERON)
    before = len(Prompt.from_messages([HERON], tokenizer).tokens)
    assert computed(conversation) == before
    text = ask(conversation, CRANE)
    assert 0 < computed(conversation) < len(Prompt.from_messages(conversation.messages[:3], tokenizer).tokens) - before
    assert text == expected(tokenizer, conversation.messages[:3])


def test_no_state_of_another_conversation_is_used(tokenizer: TokenizerWrapper) -> None:
    conversation = converse(tokenizer)
    ask(conversation, HERON)
    conversation.messages.clear()
    text = ask(conversation, CRANE)
    assert computed(conversation) == len(Prompt.from_messages([CRANE], tokenizer).tokens)
    assert text == expected(tokenizer, [CRANE])


def test_thoughts_that_the_template_drops_cost_only_the_answer_again(forgetful: TokenizerWrapper) -> None:
    conversation = converse(forgetful)
    ask(conversation, HERON)
    text = ask(conversation, CRANE)
    kept = Prompt.from_messages([HERON], forgetful).answer_start
    assert computed(conversation) == len(Prompt.from_messages(conversation.messages[:3], forgetful).tokens) - kept
    assert text == expected(forgetful, conversation.messages[:3])


def test_an_answer_that_is_stopped_keeps_its_message(tokenizer: TokenizerWrapper) -> None:
    conversation = converse(tokenizer, [HERON])
    spoken: list[str] = []
    for delta in conversation.answer(8, stopped=lambda: len(spoken) == 4):
        spoken.append(delta.content)
    assert len(spoken) == 5 and conversation.messages[1]["content"] == "".join(spoken)
    ask(conversation, CRANE)
    assert computed(conversation) < len(Prompt.from_messages([CRANE], tokenizer).tokens) + 5


def test_an_answer_that_is_abandoned_keeps_the_state_of_its_prompt(tokenizer: TokenizerWrapper) -> None:
    conversation = converse(tokenizer, [HERON])
    for _ in conversation.answer(8):
        break
    assert conversation.messages == [HERON]
    text = "".join(delta.content for delta in conversation.answer(8))
    prompt = Prompt.from_messages([HERON], tokenizer)
    assert computed(conversation) == len(prompt.tokens) - prompt.answer_start
    assert text == expected(tokenizer, [HERON])


def test_a_turn_that_is_taken_back_keeps_the_state_before_it(tokenizer: TokenizerWrapper) -> None:
    conversation = converse(tokenizer)
    ask(conversation, HERON)
    conversation.messages.append({"role": "user", "content": "Tell me a story about a sofa."})
    for _ in conversation.answer(8):
        break
    del conversation.messages[2:]
    ask(conversation, CRANE)
    assert computed(conversation) < len(Prompt.from_messages([CRANE], tokenizer).tokens) + 5


def test_an_argument_that_may_be_null_keeps_its_type(tokenizer: TokenizerWrapper) -> None:
    number = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    parameters = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    add = {"name": "add", "description": "Add two numbers.", "parameters": parameters}
    question = [{"role": "user", "content": "Add 7 and 81."}]
    conversation = converse(tokenizer, question, [{"type": "function", "function": add}])
    list(conversation.answer(60))
    assert conversation.messages[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 7, "b": 81}}


def test_tools_are_refused_where_the_model_cannot_call_them(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_tool_parser", None)
    monkeypatch.setattr(tokenizer, "_tool_call_start", None)
    with pytest.raises(ValueError, match="leave out the tools"):
        converse(tokenizer, [HERON], [{"type": "function", "function": {"name": "add"}}])


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "qwen3_moe"])
def test_a_conversation_with_sliding_windows_computes_only_what_is_new(checkpoint: WriteFamily, family: str) -> None:
    """The template rewrites earlier answers, as gpt-oss' does."""
    folder = checkpoint(family)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.role == 'user' else 'It said something.' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rewriting = load_tokenizer(folder, {"chat_template": template})
    conversation = Conversation(Generator(streamed(folder), rewriting, PrefixCache(max_entries=2), 64))
    before = 0
    for word in ("heron", "crane", "sofa"):
        text = ask(conversation, {"role": "user", "content": f"What is a {word}, and why? " * 20})
        prompt = Prompt.from_messages(conversation.messages[:-1], rewriting).tokens
        whole = mlx_lm.generate(resident(folder), rewriting, prompt, max_tokens=8, prefill_step_size=64)
        assert text == whole
        assert computed(conversation) <= len(prompt) - before
        before = len(prompt) - 1
    assert before > 3 * 128
