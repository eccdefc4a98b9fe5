"""Conversations as a chat template renders them."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from demo import MODEL
from flashmoe_mlx.generation.fitted_messages import MOVED, Message
from flashmoe_mlx.generation.prompt import NEW_ANSWER, Prompt, _log_once
from tests.support.thinking import TEMPLATE


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


HERON = {"role": "user", "content": "What is a heron?"}


@pytest.mark.parametrize(
    "content", ["What is <think>?", "<think>\n</think> <think>", "Say </think> and then <think>", "<think>"]
)
def test_a_marker_in_a_question_opens_no_thought(thinker: TokenizerWrapper, content: str) -> None:
    for wanted in (True, False):
        prompt = Prompt.from_messages([{"role": "user", "content": content}], thinker, (), {"enable_thinking": wanted})
        assert prompt.in_thought == wanted
        assert thinker.decode(prompt.tokens[: prompt.answer_start]).endswith("assistant\n")


@pytest.mark.parametrize(
    ("content", "in_thought"),
    [("A heron is", False), ("<think>A bird", True), ("<think>A bird</think>A", False), ("A  ", False)],
)
def test_a_last_message_is_continued_where_it_ends(thinker: TokenizerWrapper, content: str, in_thought: bool) -> None:
    messages = [HERON, {"role": "assistant", "content": content}]
    prompt = Prompt.from_messages(messages, thinker, continue_final_message=True)
    assert thinker.decode(prompt.tokens).endswith(f"<|im_start|>assistant\n{content}")
    assert (prompt.in_thought, prompt.notes) == (in_thought, ())
    new = Prompt.from_messages(messages, thinker)
    assert thinker.decode(new.tokens).count("<|im_start|>assistant\n") == 2
    assert new.notes == (NEW_ANSWER,)


def test_an_empty_last_message_is_left_out(thinker: TokenizerWrapper) -> None:
    empty = {"role": "assistant", "content": ""}
    prompt = Prompt.from_messages([HERON, empty], thinker, continue_final_message=True)
    assert prompt == Prompt.from_messages([HERON], thinker)


@pytest.mark.parametrize(
    "last",
    [
        HERON,
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ],
)
def test_only_texts_of_the_assistant_are_continued(thinker: TokenizerWrapper, last: Message) -> None:
    with pytest.raises(ValueError, match="only a text of the assistant can be continued"):
        Prompt.from_messages([HERON, last], thinker, continue_final_message=True)


def test_an_empty_conversation_is_refused(thinker: TokenizerWrapper) -> None:
    for wanted in (True, False):
        with pytest.raises(ValueError, match="there are no messages"):
            Prompt.from_messages([], thinker, continue_final_message=wanted)


def test_a_change_of_the_messages_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The demo model's template drops a second system message."""
    _log_once.cache_clear()
    tokenizer = load_tokenizer(MODEL)
    late = {"role": "system", "content": "Answer in Norwegian."}
    for messages in ([HERON, late], [{"role": "system", "content": "Be brief."}, HERON, late]):
        for _ in range(2):
            prompt = Prompt.from_messages(messages, tokenizer)
            assert prompt.notes == (MOVED,)
            assert "What is a heron?\n\nAnswer in Norwegian." in tokenizer.decode(prompt.tokens)
    assert [record.getMessage() for record in caplog.records] == [MOVED]
