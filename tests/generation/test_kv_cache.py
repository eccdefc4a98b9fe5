"""KV caches with a limit, quantized ones, and settings that a model's attention does not support."""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.models.cache import RotatingKVCache as MlxRotatingKVCache
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.kv_cache import (
    RotatingKVCache,
    check_quantization,
    fit_rotating,
    make_kv_cache,
    plan_prefill,
    refuse_context,
)
from flashmoe_mlx.generation.prefix_cache import PrefixCache
from tests.conftest import WriteFamily
from tests.support.oracle import streamed

LONG = [(37 * i * i + 11) % 320 for i in range(60)]


class Model(nn.Module):
    """A model with a cache of some layers."""

    def __init__(self, *layers: Any):
        super().__init__()
        self.make_cache = lambda: list(layers)


def tokens(model: nn.Module, cache: list[Any] | None = None, **options: Any) -> list[int]:
    steps = generate_step(mx.array(LONG), model, max_tokens=12, prompt_cache=cache, prefill_step_size=32, **options)
    return [int(token) for token, _ in steps]


def places(cache: list[Any]) -> list[int]:
    """Tokens that each layer of full attention has room for."""
    return [layer.keys.shape[2] for layer in cache if isinstance(layer, MlxRotatingKVCache) and layer.keep]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "nemotron_h", "lfm2_moe", "gpt_oss", "llama4", "gemma4_text"])
def test_a_limit_holds_in_models_with_caches_of_their_own(checkpoint: WriteFamily, family: str) -> None:
    """Below the limit, it changes nothing."""
    model = streamed(checkpoint(family))
    assert tokens(model, make_kv_cache(model, 128)) == tokens(model)
    cache = make_kv_cache(model, 16)
    tokens(model, cache)
    assert places(cache) == [16]


@pytest.mark.parametrize("limit", [5, 16, 40, 128])
def test_a_limit_is_mlx_lms_in_models_without(checkpoint: WriteFamily, limit: int) -> None:
    model = streamed(checkpoint("qwen3_moe"))
    assert tokens(model, make_kv_cache(model, limit)) == tokens(model, max_kv_size=limit)


def test_a_limit_forgets_what_is_in_the_middle(checkpoint: WriteFamily) -> None:
    """Of a hybrid model: the first 4 tokens and the last ones stay, as those of mlx-lm's cache do."""
    model = streamed(checkpoint("qwen3_5_moe"))
    oracle = [MlxRotatingKVCache(16, 4) if type(layer) is KVCache else layer for layer in make_prompt_cache(model)]
    assert tokens(model, make_kv_cache(model, 16)) == tokens(model, oracle)


@pytest.mark.parametrize("limit", [-1, 0, 1, 4])
def test_a_limit_leaves_room_for_more_than_the_start(checkpoint: WriteFamily, limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_kv_size is {limit}: it must be at least 5"):
        make_kv_cache(streamed(checkpoint("qwen3_moe")), limit)


@pytest.mark.parametrize(
    "layers",
    [[CacheList(KVCache(), KVCache())], [KVCache(), QuantizedKVCache()], [ArraysCache(2), CacheList(KVCache())]],
)
def test_a_limit_is_refused_where_it_would_not_hold(layers: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"(CacheList|QuantizedKVCache) cannot be limited: leave out --max-kv-size"):
        make_kv_cache(Model(*layers), 64)
    assert len(make_kv_cache(Model(*layers))) == len(layers)


def test_a_restored_window_is_ours_with_its_state() -> None:
    window = MlxRotatingKVCache(max_size=8, keep=2)
    for _ in range(3):
        window.update_and_fetch(mx.ones((1, 1, 4, 64)), mx.ones((1, 1, 4, 64)))
    (fitted,) = fit_rotating([window])
    assert type(fitted) is RotatingKVCache and fitted.to_quantized() is fitted
    assert fitted.state[2:] == window.state[2:] == (12, 2, 8, 11)


@pytest.mark.parametrize("start", [0, 30, 100])
@pytest.mark.parametrize("family", ["gemma4_text", "qwen3_5_moe", "llama4"])
def test_the_layers_that_can_be_are_quantized(checkpoint: WriteFamily, family: str, start: int) -> None:
    """A sliding window stays as it is, and a second prompt continues the quantized state."""
    folder = checkpoint(family)
    model, settings = streamed(folder), {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    check_quantization(model, 8, 32)
    text = Generator(model, load_tokenizer(folder), PrefixCache(), 32, settings)
    context = text.prefill(LONG, {})
    first = [response.token for response in text.decode(context, 8)]
    quantized = [isinstance(layer, QuantizedKVCache) for layer in context.cache]
    assert quantized == [start < 60 and type(layer) is KVCache for layer in make_prompt_cache(model)]
    whole = list(
        stream_generate(
            model,
            load_tokenizer(folder),
            LONG,
            max_tokens=8,
            prompt_cache=make_kv_cache(model),
            prefill_step_size=32,
            **settings,
        )
    )
    assert first == [response.token for response in whole]
    second = text.prefill([*context.tokens, 5, 6, 7], {})
    assert second.cached_tokens == len(LONG) + 8
    assert list(text.decode(second, 4))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt_oss", (8, 32), "this model: Quantized SDPA does not support attention sinks. Leave it out"),
        ("deepseek_v3", (8, 32), "--kv-bits 8 with --kv-group-size 32 does not work with this model"),
        ("qwen3_moe", (8, 64), "--kv-bits 8 with --kv-group-size 64 does not work with this model"),
        ("qwen3_5_moe", (7, 32), "--kv-bits 7 with --kv-group-size 32 does not work with this model"),
        ("qwen3_5_moe", (8, 32, 64), "cannot be quantized: leave out --kv-bits or --max-kv-size"),
    ],
)
def test_a_quantization_that_does_not_work_is_refused_at_once(
    checkpoint: WriteFamily, family: str, options: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_quantization(streamed(checkpoint(family)), *options)


def test_a_quantization_without_effect_is_refused(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(checkpoint("qwen3_5_moe"))
    check_quantization(model, None, 64)
    monkeypatch.setattr(KVCache, "to_quantized", lambda cache, **_: cache)
    with pytest.raises(ValueError, match="--kv-bits 8 has no effect: this model has no layer"):
        check_quantization(model, 8, 32)


def test_a_read_that_fails_is_no_reason_against_a_quantization(
    checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the disk is gone")

    model = streamed(checkpoint("qwen3_5_moe"))
    monkeypatch.setattr(type(model), "__call__", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        check_quantization(model, 8, 32)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, (2000, None, 64)),
        ({"max_kv_size": 64}, (64 + 511, None, 64)),
        ({"max_kv_size": 4000}, (2000, None, 64)),
        ({"kv_bits": 8, "kv_group_size": 32}, (2000, 8, 32)),
        ({"kv_bits": 8, "quantized_kv_start": 5000}, (2000, None, 64)),
        ({"kv_bits": 8, "quantized_kv_start": 1000}, (2000, 8, 64)),
    ],
)
def test_a_context_is_refused_by_what_the_cache_will_hold(
    checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], refused: tuple[Any, ...]
) -> None:
    """A limited cache holds a chunk of the prompt more, and a short one is not quantized yet."""
    model, asked = streamed(checkpoint("qwen3_moe")), []
    plan = plan_prefill(model, 2000, **options)
    assert (plan.tokens, plan.window, plan.quantized) == (2000, options.get("max_kv_size"), refused[1] is not None)
    monkeypatch.setattr(type(model.streaming), "refuse_context", lambda _, *context: asked.append(context))
    refuse_context(model, 2000, 512, **options)
    assert asked == [refused]
