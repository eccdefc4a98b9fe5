"""Conversations as a chat template renders them."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from demo import MODEL
from flashmoe_mlx.generation.prompt import Prompt

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant\n{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}
{%- endif -%}"""


@pytest.fixture
def thinker() -> TokenizerWrapper:
    return load_tokenizer(MODEL, {"chat_template": TEMPLATE})


def test_prefixes_end_where_other_prompts_diverge(thinker: TokenizerWrapper) -> None:
    """After the system message, and before the thought that the template starts: the next prompt is without it."""
    system = {"role": "system", "content": "You are a pocket dictionary."}
    turns = [system, {"role": "user", "content": "What is a heron?"}]
    first = Prompt.from_messages(turns, thinker)
    other = Prompt.from_messages([system, {"role": "user", "content": "Define a sofa."}], thinker)
    turns += [{"role": "assistant", "content": "A bird."}, {"role": "user", "content": "Which?"}]
    then = Prompt.from_messages(turns, thinker)
    assert 0 < first.preamble == other.preamble < first.answer_start
    for prompt, length in ((other, first.preamble), (then, first.answer_start)):
        assert prompt.tokens[:length] == first.tokens[:length]
        assert prompt.tokens[: length + 1] != first.tokens[: length + 1]


def test_no_preamble_without_system_message_and_tools(thinker: TokenizerWrapper) -> None:
    assert Prompt.from_messages([{"role": "user", "content": "What is a heron?"}], thinker).preamble == 0


def test_no_preamble_where_the_template_rejects_a_conversation_that_has_only_begun() -> None:
    strict = "{% if not messages[-1].content %}{{ raise_exception('empty') }}{% endif %}" + TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a heron?"}]
    assert Prompt.from_messages(messages, load_tokenizer(MODEL, {"chat_template": strict})).preamble == 0


def test_template_options_decide_whether_the_answer_begins_in_a_thought(thinker: TokenizerWrapper) -> None:
    question = [{"role": "user", "content": "What is a heron?"}]
    for wanted in (True, False):
        assert Prompt.from_messages(question, thinker, (), {"enable_thinking": wanted}).in_thought == wanted
