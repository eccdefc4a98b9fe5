"""mlx-lm's own entry points work on a streamed model and give what they give for a resident one."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flashmoe_mlx
from flashmoe_mlx.model import budget
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, resident

TEXT = "The heron stands in the shallows and"

Models = tuple[nn.Module, nn.Module, TokenizerWrapper]


@pytest.fixture(scope="module", params=["qwen3_5_moe", "gpt_oss"])
def models(request: pytest.FixtureRequest, checkpoint: WriteFamily) -> Models:
    """A streamed model with too few slots, a resident one, and their tokenizer."""
    folder = checkpoint(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_SHARED_SLOTS", 16)
        model, tokenizer = flashmoe_mlx.load(str(folder))
    return model, resident(folder), tokenizer


def test_generate(models: Models) -> None:
    model, oracle, tokenizer = models
    text = mlx_lm.generate(model, tokenizer, prompt=TEXT, max_tokens=32)
    assert text == mlx_lm.generate(oracle, tokenizer, prompt=TEXT, max_tokens=32)
    assert text


@pytest.mark.parametrize("step", [1, 5, None])
def test_chunks(models: Models, step: int | None) -> None:
    """The generated tokens do not depend on the size of prefill chunks."""
    model, oracle, tokenizer = models
    step = step or model.streaming.prefill_step_size
    text = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=32, prefill_step_size=step)
    assert text == mlx_lm.generate(oracle, tokenizer, TEXT, max_tokens=32)


def test_stream_generate(models: Models) -> None:
    model, oracle, tokenizer = models
    actual, expected = (
        [(r.token, r.text) for r in mlx_lm.stream_generate(each, tokenizer, TEXT, max_tokens=16)]
        for each in (model, oracle)
    )
    assert actual == expected


def test_batch_generate(models: Models) -> None:
    model, oracle, tokenizer = models
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:17]]
    actual, expected = (
        batch_generate(each, tokenizer, prompts, max_tokens=16, return_token_ids=True).token_ids
        for each in (model, oracle)
    )
    assert actual == expected
    assert all(actual)


def test_sampling(models: Models) -> None:
    model, oracle, tokenizer = models
    texts = []
    for each in (model, oracle):
        mx.random.seed(7)
        texts.append(mlx_lm.generate(each, tokenizer, TEXT, max_tokens=32, sampler=make_sampler(temp=0.8)))
    assert texts[0] == texts[1]


def test_restored_prompt_cache(models: Models, tmp_path: Path) -> None:
    model, oracle, _ = models
    file = str(tmp_path / "cache.safetensors")
    cache, oracle_cache = make_prompt_cache(model), make_prompt_cache(oracle)
    mx.eval(model(mx.array([PROMPT]), cache=cache), oracle(mx.array([PROMPT]), cache=oracle_cache))
    save_prompt_cache(file, cache)
    expected = go_on(oracle, oracle_cache)
    assert mx.array_equal(go_on(model, cache), expected)
    assert mx.array_equal(go_on(model, load_prompt_cache(file)), expected)


def test_quantized_kv_cache(checkpoint: WriteFamily) -> None:
    # gpt_oss's rotating cache cannot be quantised.
    folder = checkpoint("qwen3_5_moe")
    model, _ = flashmoe_mlx.load(str(folder))
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    expected = go_on(resident(folder), None, **options)
    assert mx.array_equal(go_on(model, None, **options), expected)
    # The options did something.
    assert not mx.array_equal(go_on(model, None), expected)


def go_on(model: nn.Module, cache: list[Any] | None, **options: Any) -> mx.array:
    """The log-probabilities of 16 greedy tokens after three more of the prompt."""
    steps = generate_step(mx.array([5, 6, 7]), model, max_tokens=16, prompt_cache=cache, **options)
    return mx.stack([logprobs for _, logprobs in steps])
