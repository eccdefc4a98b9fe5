"""Conversations as a chat template renders them."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from demo import MODEL
from flashmoe_mlx.generation import prompt
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


def test_where_other_prompts_may_begin(thinker: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the system message, and before the answer: what comes next begins with the same tokens."""
    monkeypatch.setattr(prompt, "_MIN_PREFIX", 1)
    system = {"role": "system", "content": "You are a pocket dictionary."}
    turns = [system, {"role": "user", "content": "What is a heron?"}]
    first = Prompt.from_messages(turns, thinker)
    other = Prompt.from_messages([system, {"role": "user", "content": "Define a sofa."}], thinker)
    turns += [{"role": "assistant", "content": "A bird."}, {"role": "user", "content": "Which?"}]
    then = Prompt.from_messages(turns, thinker)
    after_system, before_answer = first.prefix_lengths
    assert first.tokens[:after_system] == other.tokens[:after_system] and after_system in other.prefix_lengths
    assert first.tokens[:before_answer] == then.tokens[:before_answer]
    assert first.tokens[: before_answer + 1] != then.tokens[: before_answer + 1]


def test_template_options_decide_whether_the_answer_begins_in_a_thought(thinker: TokenizerWrapper) -> None:
    question = [{"role": "user", "content": "What is a heron?"}]
    for wanted in (True, False):
        assert Prompt.from_messages(question, thinker, (), {"enable_thinking": wanted}).in_thought == wanted
