"""The demo model, streamed: it knows its words, calls its tool, and needs its experts."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from demo.talk import talk
from flashmoe_mlx import generate
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from tests.support.oracle import streamed

DEFINITIONS = {
    "heron": "grey or white wading bird with long neck and long legs and (usually) long bill",
    "marimba": "a percussion instrument with wooden bars tuned to produce a chromatic scale and with resonators",
    "sofa": "an upholstered seat for more than one person",
}


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(MODEL)


def define(word: str, tokenizer: TokenizerWrapper, **options: int) -> str:
    messages = [{"role": "user", "content": f"What is a {word}?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text: str = mlx_lm.generate(streamed(MODEL, fraction=0.5, **options), tokenizer, prompt, max_tokens=40)
    return text


@pytest.mark.parametrize("word", DEFINITIONS)
def test_definition_is_word_for_word(word: str, tokenizer: TokenizerWrapper) -> None:
    assert define(word, tokenizer) == f"{word} (noun): {DEFINITIONS[word]}."


def test_definitions_need_all_experts_of_a_token(tokenizer: TokenizerWrapper) -> None:
    assert DEFINITIONS["heron"] not in define("heron", tokenizer, experts_per_token=1)


def test_question_is_answered_with_a_tool_call(tokenizer: TokenizerWrapper) -> None:
    question, call, result, answer = talk(streamed(MODEL), tokenizer, "What is the weather in Oslo?")
    assert question["role"] == "user"
    assert [each["function"] for each in call["tool_calls"]] == [{"name": "get_weather", "arguments": {"city": "Oslo"}}]
    assert result["role"] == "tool"
    assert answer["content"] == "It is 7 degrees and rainy in Oslo."


def test_all_experts_are_used(tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, set[int]] = {}
    call = StreamedSwitchGLU.__call__

    def counted(layer: StreamedSwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        used.setdefault(id(layer), set()).update(np.unique(np.array(indices)).tolist())
        return call(layer, x, indices)

    monkeypatch.setattr(StreamedSwitchGLU, "__call__", counted)
    tokens = mx.array(tokenizer.encode((MODEL.parent / "text.txt").read_text())[:160])
    # In rows, because a CPU runs linear attention token by token.
    mx.eval(streamed(MODEL)(tokens.reshape(8, 20)))
    assert len(used) == 8
    assert min(map(len, used.values())) >= 0.9 * 64


def test_commands_run_the_demo_model_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--prompt", "What is a heron?", "--verbose", "False"])
    out, error = capsys.readouterr()
    assert DEFINITIONS["heron"] in out
    assert error.startswith("no --model given") and error.count("\n") == 1
