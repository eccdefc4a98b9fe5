"""Fused decode steps against mlx-lm's layers, and their kernels against their references."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from benchmarks.trunk import DIMS, KINDS, cache_of, random_layer
from demo import MODEL
from flashmoe_mlx.layers.fused_decoder import FusedDecoderLayer, NormHandoff
from flashmoe_mlx.layers.qwen3_next import fuse_decoder_layers
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import GPUS, Backend
from flashmoe_mlx.ops.routing import route
from tests.conftest import WriteFamily
from tests.support.fused import arrays, plain_and_fused, steps
from tests.support.kernel_checks import FUSED_FAMILIES, ROUNDING, check_between_products, check_route
from tests.support.operands import error, normal
from tests.support.oracle import mlx_lm_model, streamed

REFERENCE = Backend.REFERENCE


@pytest.mark.parametrize("on", GPUS)
def test_emulated_kernels_are_near_their_references(on: Backend, emulated: None) -> None:
    check_between_products(on, mx.float32, tokens=1, dim=32, key_heads=2, share=2, hidden=160, top_k=4)
    check_between_products(on, mx.bfloat16, tokens=5, dim=64, key_heads=1, share=3, hidden=544, top_k=10)
    check_between_products(on, mx.float16, tokens=1, dim=64, key_heads=1, share=8, hidden=4160, top_k=16)


@pytest.mark.parametrize(
    ("dtype", "experts", "top_k", "normalize"),
    [(mx.float32, 16, 4, True), (mx.bfloat16, 65, 10, False), (mx.float16, 64, 1, True)],
)
def test_emulated_routes_are_the_references(
    dtype: mx.Dtype, experts: int, top_k: int, normalize: bool, emulated: None
) -> None:
    check_route(Backend.METAL, dtype, top_k, normalize, 2 * normal(1, 1, 3, experts + 1))
    # Rounded, so that many are equal.
    ties = mx.round(normal(2, 1, 3, experts + 1))
    check_route(Backend.METAL, dtype, top_k, normalize, ties)
    check_route(Backend.METAL, dtype, top_k, normalize, mx.zeros_like(ties))


def test_route_names_existing_experts_for_any_logits(emulated: None) -> None:
    """A broken model's logits still name experts that exist, each of them once."""
    for logits in (mx.full((1, 1, 17), float("nan")), mx.full((1, 1, 17), float("inf"))):
        chosen, _ = route.on(Backend.METAL)(logits, 4, True)
        assert len(set(chosen.flatten().tolist())) == 4
        assert mx.all(chosen < 16).item()


@pytest.mark.metal
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gpu_kernels_are_near_their_references(dtype: mx.Dtype, on_gpu: Backend) -> None:
    # An NVIDIA GPU runs Metal's launches as well.
    for backend in {on_gpu, Backend.METAL}:
        check_between_products(backend, dtype, tokens=1, dim=128, key_heads=16, share=4, hidden=4096, top_k=10)
        check_between_products(backend, dtype, tokens=5, dim=64, key_heads=1, share=3, hidden=544, top_k=10)
        check_between_products(backend, dtype, tokens=1, dim=256, key_heads=2, share=16, hidden=4096, top_k=16)
    check_route(on_gpu, dtype, 10, True, 2 * normal(1, 1, 3, 513))
    check_route(on_gpu, dtype, 16, True, 2 * normal(3, 1, 3, 513))
    check_route(on_gpu, dtype, 10, True, mx.round(2 * normal(2, 1, 3, 513)))


@pytest.mark.parametrize(("family", "count"), [("qwen3_5_moe", 200), ("qwen3_next", 40)])
def test_fused_steps_are_mlx_lms(family: str, count: int, checkpoint: WriteFamily) -> None:
    """Logits and states, of steps of one to many tokens."""
    theirs, ours = plain_and_fused(checkpoint(family), REFERENCE)
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    lengths = [1, 20, *[1, 3, 1, 1, 1, 1, 8, 1, 1, 9] * 20][:count]
    for their, our in zip(steps(theirs, caches[0], lengths), steps(ours, caches[1], lengths), strict=True):
        assert error(our, their) < 1e-5
    for their, our in zip(*map(arrays, caches), strict=True):
        assert error(our, their) < 1e-5


@pytest.mark.parametrize("on", GPUS)
def test_emulated_steps_are_mlx_lms(
    on: Backend, emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = plain_and_fused(checkpoint("qwen3_5_moe"), on)
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    launches: list[str] = []
    compiled = gpu.compiled
    monkeypatch.setattr(gpu, "compiled", lambda kernel: launches.append(kernel.name) or compiled(kernel))
    lengths = [10, 1, 3, 1]
    for their, our in zip(steps(theirs, caches[0], lengths), steps(ours, caches[1], lengths), strict=True):
        assert error(our, their) < 1e-5
    for their, our in zip(*map(arrays, caches), strict=True):
        assert error(our, their) < 1e-5
    counts = {name: launches.count(name) for name in set(launches)}
    each = dict.fromkeys(("add_norm", "router_and_shared", "route", "combine"), 12)
    linear = {"linear": 24} if on is Backend.CUDA else {}
    assert counts == {"gated_delta": 9, "norm_rope": 3, "attention_split": 3, "attention_merge": 3} | linear | each


def test_a_norm_is_computed_once(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layer before; only the first layer, and one that gets another array, compute their own."""
    _, ours = plain_and_fused(checkpoint("qwen3_5_moe"), REFERENCE)
    cache = make_prompt_cache(ours)
    mx.eval(ours(mx.arange(2, 14)[None], cache=cache))
    taken = []
    take = NormHandoff.take
    monkeypatch.setattr(NormHandoff, "take", lambda self, x: taken.append(y := take(self, x)) or y)
    mx.eval(ours(mx.array([[5]]), cache=cache))
    assert [normed is None for normed in taken] == [True, False, False, False]
    x = mx.ones((1, 1, 128))
    taken.clear()
    for layer, each in zip(ours.layers, cache, strict=True):
        x = mx.array(layer(x, None, each))
    assert all(normed is None for normed in taken)


def test_the_demo_model_says_the_same() -> None:
    answers = []
    for swapped in (False, True):
        model = mlx_lm_model(MODEL)
        assert not swapped or fuse_decoder_layers(model, REFERENCE) == len(model.layers)
        cache = make_prompt_cache(model)
        tokens = [11, 400, 52, 9, 1000, 77]
        logits = model(mx.array([tokens]), cache=cache)
        for _ in range(24):
            tokens.append(mx.argmax(logits[0, -1]).item())
            logits = model(mx.array([tokens[-1:]]), cache=cache)
        answers.append(tokens)
    assert answers[0] == answers[1]


def test_nothing_is_held_twice(checkpoint: WriteFamily) -> None:
    model = mlx_lm_model(checkpoint("qwen3_5_moe"))
    before = dict(tree_flatten(model.parameters()))
    shapes = {name: (array.shape, array.dtype) for name, array in before.items()}
    values = {name: np.array(array.view(mx.uint8)) for name, array in before.items()}
    del before
    memory = mx.get_active_memory()
    fuse_decoder_layers(model, REFERENCE)
    mx.eval(model.parameters())
    assert mx.get_active_memory() - memory < 0.02 * memory
    after = dict(tree_flatten(model.parameters()))
    assert {name: (array.shape, array.dtype) for name, array in after.items()} == shapes
    assert all(np.array_equal(np.array(array.view(mx.uint8)), values[name]) for name, array in after.items())


def test_a_prompt_cache_fits_both(checkpoint: WriteFamily, tmp_path: Path) -> None:
    theirs, ours = plain_and_fused(checkpoint("qwen3_5_moe"), REFERENCE)
    cache = make_prompt_cache(ours)
    for logits in steps(ours, cache, [12, 1, 1, 1]):
        mx.eval(logits)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    token = mx.array([[5]])
    assert error(theirs(token, cache=loaded), ours(token, cache=cache)) < 1e-5


def test_other_calls_are_mlx_lms(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, left padding, no cache, a first step, and long ones."""
    theirs, ours = plain_and_fused(checkpoint("qwen3_5_moe"), REFERENCE)
    for layer in ours.layers:
        if layer.is_linear:
            monkeypatch.setattr(layer, "_fused", dataclasses.replace(layer._fused, mix=None))
    token, tokens = mx.array([[5]]), mx.arange(2, 14)[None]

    def same(call: Callable[[nn.Module], mx.array]) -> None:
        assert mx.array_equal(call(theirs), call(ours))

    def after(prompt: mx.array, following: mx.array, change: Callable[[Any], Any], model: nn.Module) -> mx.array:
        cache = make_prompt_cache(model)
        mx.eval(model(prompt, cache=cache))
        return model(following, cache=[change(each) for each in cache])

    def padded(cache: Any) -> Any:
        return type(cache)(2, left_padding=[1]) if isinstance(cache, ArraysCache) else cache

    same(lambda model: model(token))
    same(lambda model: model(tokens, cache=make_prompt_cache(model)))
    same(partial(after, tokens, tokens, lambda cache: cache))
    same(partial(after, mx.concatenate([tokens, tokens]), mx.array([[5], [6]]), lambda cache: cache))
    same(lambda model: model(tokens[:, :3], cache=[padded(cache) for cache in make_prompt_cache(model)]))


def test_a_quantized_kv_cache_is_mlx_lms(checkpoint: WriteFamily) -> None:
    theirs, ours = plain_and_fused(checkpoint("qwen3_5_moe"), REFERENCE)
    logits = []
    for model in (theirs, ours):
        cache = make_prompt_cache(model)
        mx.eval(model(mx.arange(2, 14)[None], cache=cache))
        cache = [each.to_quantized(32, 8) if hasattr(each, "to_quantized") else each for each in cache]
        logits.append(model(mx.array([[5]]), cache=cache))
    assert error(logits[1], logits[0]) < 1e-5


@pytest.mark.parametrize(
    "quantization", [None, {"mode": "mxfp4"}, {"group_size": 32, "bits": 4}], ids=["none", "mxfp4", "affine"]
)
def test_other_quantizations_are_left_alone(quantization: dict[str, Any] | None, checkpoint: WriteFamily) -> None:
    affine = quantization is not None and "mode" not in quantization
    model = mlx_lm_model(checkpoint("qwen3_5_moe", quantization))
    assert fuse_decoder_layers(model, REFERENCE) == (len(model.layers) if affine else 0)


def test_mixed_bits_are_left_alone(checkpoint: WriteFamily) -> None:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if path.endswith(("in_proj_a", "shared_expert.up_proj")):
            return {"bits": 8, "group_size": 64}
        return hasattr(module, "to_quantized")

    model = mlx_lm_model(checkpoint("qwen3_5_moe", predicate=predicate))
    # The one with attention.
    assert fuse_decoder_layers(model, REFERENCE) == 1
    assert [isinstance(layer, FusedDecoderLayer) for layer in model.layers] == [False] * 3 + [True]


def test_layers_with_adapters_are_mlx_lms(checkpoint: WriteFamily) -> None:
    """Those that have adapters, and those that get some after fusing."""
    theirs, early, late = (mlx_lm_model(checkpoint("qwen3_5_moe")) for _ in range(3))
    assert fuse_decoder_layers(late, REFERENCE) == 4
    for model in (theirs, early, late):
        mx.random.seed(1)
        linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
        for name, array in tree_flatten(model.trainable_parameters()):
            if name.endswith("lora_b"):
                model.update(tree_unflatten([(name, mx.random.normal(array.shape))]))
    assert fuse_decoder_layers(early, REFERENCE) == 2
    caches = [make_prompt_cache(model) for model in (theirs, early, late)]
    for wanted, *others in zip(*map(partial(steps, lengths=[5, 1, 1]), (theirs, early, late), caches), strict=True):
        assert all(error(other, wanted) < 1e-5 for other in others)


def test_a_model_in_another_dtype_is_mlx_lms(checkpoint: WriteFamily) -> None:
    theirs, ours = plain_and_fused(checkpoint("qwen3_5_moe"), REFERENCE)
    for model in (theirs, ours):
        model.set_dtype(mx.float16)
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    for their, our in zip(*map(partial(steps, lengths=[2, 1]), (theirs, ours), caches), strict=True):
        assert mx.array_equal(our, their)


def test_other_families_are_left_alone(checkpoint: WriteFamily) -> None:
    assert fuse_decoder_layers(mlx_lm_model(checkpoint("qwen3_moe")), REFERENCE) == 0


@pytest.mark.metal
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_steps_on_gpu_are_mlx_lms(family: str, on_gpu: Backend, checkpoint: WriteFamily) -> None:
    """Streamed or resident."""
    folder = checkpoint(family)
    models = [mlx_lm_model(folder), streamed(folder), streamed(folder, 1)]
    assert all(isinstance(layer, FusedDecoderLayer) for model in models[1:] for layer in model.layers)
    caches = [make_prompt_cache(model) for model in models]
    lengths = [10, 1, 3, 1, 20, 1, 8, 1, 1]
    for wanted, few, all_ in zip(
        *(steps(model, cache, lengths) for model, cache in zip(models, caches, strict=True)), strict=True
    ):
        assert error(few, wanted) < 1e-3
        assert error(all_, wanted) < 1e-3
    for wanted, few, all_ in zip(*map(arrays, caches), strict=True):
        assert error(few, wanted) < 1e-3
        assert error(all_, wanted) < 1e-3


@pytest.mark.metal
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_gpu_is_as_near_float32_as_mlx_lm(kind: str, on_gpu: Backend) -> None:
    """Layers of the 397B model's size."""
    mx.random.seed(3)
    settings = DIMS["397b"] | {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "type": "default"}}
    layer = random_layer(qwen3_5.TextModelArgs.from_dict(settings), KINDS[kind], mx.bfloat16)
    cache = cache_of(layer, 300, mx.bfloat16)
    ours, wide = copy.deepcopy(layer), copy.deepcopy(layer)
    assert fuse_decoder_layers(ours, on_gpu) == 1
    wide.set_dtype(mx.float32)
    wide_cache = copy.deepcopy(cache)
    if kind == "attention":
        wide_cache.keys, wide_cache.values = (each.astype(mx.float32) for each in (cache.keys, cache.values))
    else:
        wide_cache[0] = cache[0].astype(mx.float32)
    errors = []
    # Many, because a near tie of two experts may be decided either way.
    for _ in range(16):
        x = mx.random.normal((1, 1, 4096)).astype(mx.bfloat16)
        wanted = wide(x.astype(mx.float32), None, copy.deepcopy(wide_cache)) - x
        theirs, our = (each(x, None, copy.deepcopy(cache)) - x for each in (layer, ours))
        errors.append([error(theirs, wanted), error(our, wanted)])
    theirs_mean, our_mean = np.mean(errors, axis=0)
    assert our_mean < 1.1 * theirs_mean
