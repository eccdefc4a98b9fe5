"""Layers that decode in few launches against mlx-lm's, and their kernels against their twins."""

import copy
from collections.abc import Callable, Iterator
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

from benchmarks.exact import load_resident
from benchmarks.trunk import DIMS, KINDS, cache_of, random_layer
from flashmoe_mlx.layers import qwen3_next as trunk
from flashmoe_mlx.layers.fused_decoder import FewLaunches
from flashmoe_mlx.layers.qwen3_next import swap_trunk
from flashmoe_mlx.ops import gated_delta as trunk_ops
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.attention import Rope, attend, attend_twin, norm_rope, norm_rope_twin
from flashmoe_mlx.ops.matrices import Dense
from flashmoe_mlx.ops.norm import add_norm, add_norm_twin, combine, combine_twin
from flashmoe_mlx.ops.routing import ask, ask_twin, route, route_twin
from tests.conftest import WriteFamily
from tests.ops.test_products import quantized
from tests.support.oracle import resident, streamed

FAMILIES = ("qwen3_5_moe", "qwen3_next")
ROUNDING = {mx.float32: 2e-6, mx.float16: 2**-11 + 2e-6, mx.bfloat16: 2**-8 + 2e-6}
"""Of a value, relative to the largest one."""


def error(actual: mx.array, wanted: mx.array) -> float:
    """Relative to the size of all that is wanted."""
    assert actual.shape == wanted.shape
    a, b = (np.array(each.astype(mx.float32), np.float64) for each in (actual, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def normal(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


def layout_of(family: str, key_heads: int, share: int, dim: int) -> trunk_ops.Layout:
    """Where a row of projections has what, spelt out for each family."""
    if family == "qwen3_5_moe":
        queries, values = key_heads * dim, key_heads * share * dim
        behind = 2 * queries + 2 * values
        return (
            *((0, dim), (queries, dim)),
            *((2 * queries, share * dim), (2 * queries + values, share * dim)),
            *((behind, share), (behind + key_heads * share, share)),
        )
    stride = (2 + 2 * share) * dim
    behind = key_heads * stride
    return (
        *((0, stride), (dim, stride), (2 * dim, stride), ((2 + share) * dim, stride)),
        *((behind, 2 * share), (behind + share, 2 * share)),
    )


def check_kernels(
    dtype: mx.Dtype, *, tokens: int, dim: int, key_heads: int, share: int, hidden: int, top_k: int
) -> None:
    """Compare every kernel with what its twin computes in float32 of the same operands."""

    def same(kernel: Callable[..., Any], twin: Callable[..., Any], *operands: Any, **settings: Any) -> None:
        wide = [
            each.astype(mx.float32) if isinstance(each, mx.array) and each.dtype == dtype else each for each in operands
        ]
        actual, wanted = kernel(*operands, **settings), twin(*wide, **settings)
        for a, w in zip(*([each] if isinstance(each, mx.array) else each for each in (actual, wanted)), strict=True):
            assert error(a, w) < ROUNDING[dtype], kernel.__name__

    heads = key_heads * share
    channels = (2 * key_heads + heads) * dim
    for family in FAMILIES:
        same(
            *(trunk_ops.gated_delta, trunk_ops.gated_delta_twin),
            normal(1, 1, tokens, channels + heads * dim + 2 * heads).astype(dtype),
            normal(2, 1, 3, channels).astype(dtype),
            normal(3, 1, heads, dim, dim),
            normal(4, channels, 4, 1).astype(dtype),
            mx.log(mx.random.uniform(0, 16, (heads,), key=mx.random.key(5))),
            normal(6, heads).astype(dtype),
            normal(7, dim).astype(dtype),
            layout=layout_of(family, key_heads, share, dim),
            eps=1e-6,
        )
    projected = normal(8, 1, tokens, (2 * heads + 2 * key_heads) * dim).astype(dtype)
    same(
        *(norm_rope, norm_rope_twin),
        projected,
        *(normal(9, dim).astype(dtype), normal(10, dim).astype(dtype), mx.array([7])),
        heads=heads,
        key_heads=key_heads,
        rope=Rope(dim // 4, 1e7, 1.0, 1e-6),
    )
    for capacity, position in ((256, 0), (256, 256 - tokens), (300, 100)):
        same(
            *(attend, attend_twin),
            normal(11, 1, heads, tokens, dim).astype(dtype),
            *(normal(12 + i, 1, key_heads, capacity, dim).astype(dtype) for i in range(2)),
            mx.array([position]),
            projected,
            scale=dim**-0.5,
        )
    x, y, weight = (normal(14 + i, 1, tokens, hidden).astype(dtype) for i in range(3))
    same(add_norm, add_norm_twin, x, y, weight[0, 0], eps=1e-6)
    experts, scores = (normal(17, 1, tokens, *shape).astype(dtype) for shape in ((top_k, hidden), (top_k + 1,)))
    same(combine, combine_twin, x, experts, scores, y, weight[0, 0], eps=1e-6)
    for router_bits, bits, rows in ((8, 4, 33), (4, 2, 64)):
        x = normal(19, 1, tokens, 192).astype(dtype)
        matrices, wide = [], []
        for count, width in ((17, router_bits), (rows, bits), (rows, bits)):
            weight, scales, biases = (part.squeeze(0) for part in quantized(1, count, 192, 64, width, dtype, count)[:3])
            matrices.append(Dense(weight, scales, biases, 64, width))
            wide.append(Dense(weight, scales.astype(mx.float32), biases.astype(mx.float32), 64, width))
        for a, w in zip(ask(x, *matrices), ask_twin(x.astype(mx.float32), *wide), strict=True):
            assert error(a, w) < ROUNDING[dtype]


def check_route(dtype: mx.Dtype, experts: int, top_k: int, normalize: bool, logits: mx.array) -> None:
    """The experts of the twin, in whatever order, and their scores."""
    logits = logits.astype(dtype)
    assert logits.shape[-1] == experts + 1
    chosen, scores = route(logits, top_k, normalize)
    wanted, wanted_scores = route_twin(logits, top_k, normalize)
    assert chosen.dtype == wanted.dtype and scores.dtype == wanted_scores.dtype
    ours, theirs = (mx.argsort(each, axis=-1) for each in (chosen, wanted))
    assert mx.array_equal(mx.take_along_axis(chosen, ours, -1), mx.take_along_axis(wanted, theirs, -1))
    sorted_ours, sorted_theirs = mx.take_along_axis(scores, ours, -1), mx.take_along_axis(wanted_scores, theirs, -1)
    assert error(sorted_ours, sorted_theirs) < 2 * ROUNDING[dtype]
    assert error(scores[..., -1:], wanted_scores[..., -1:]) < 2 * ROUNDING[dtype]


def test_emulated(emulated: None) -> None:
    check_kernels(mx.float32, tokens=1, dim=32, key_heads=2, share=2, hidden=160, top_k=4)
    check_kernels(mx.bfloat16, tokens=5, dim=64, key_heads=1, share=3, hidden=544, top_k=10)


@pytest.mark.parametrize(
    ("dtype", "experts", "top_k", "normalize"),
    [(mx.float32, 16, 4, True), (mx.bfloat16, 65, 10, False), (mx.float16, 64, 1, True)],
)
def test_routes_emulated(dtype: mx.Dtype, experts: int, top_k: int, normalize: bool, emulated: None) -> None:
    check_route(dtype, experts, top_k, normalize, 2 * normal(1, 1, 3, experts + 1))
    ties = mx.round(normal(2, 1, 3, experts + 1))  # many are equal
    check_route(dtype, experts, top_k, normalize, ties)
    check_route(dtype, experts, top_k, normalize, mx.zeros_like(ties))


def test_route_without_numbers(emulated: None) -> None:
    """A broken model's logits still name experts that exist, each of them once."""
    for logits in (mx.full((1, 1, 17), float("nan")), mx.full((1, 1, 17), float("inf"))):
        chosen, _ = route(logits, 4, True)
        assert len(set(chosen.flatten().tolist())) == 4
        assert mx.all(chosen < 16).item()


@pytest.mark.metal
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_gpu(dtype: mx.Dtype, on_gpu: None) -> None:
    check_kernels(dtype, tokens=1, dim=128, key_heads=16, share=4, hidden=4096, top_k=10)
    check_kernels(dtype, tokens=5, dim=64, key_heads=1, share=3, hidden=544, top_k=10)
    check_route(dtype, 512, 10, True, 2 * normal(1, 1, 3, 513))
    check_route(dtype, 512, 10, True, mx.round(2 * normal(2, 1, 3, 513)))


def both(folder: Path) -> tuple[nn.Module, nn.Module]:
    """mlx-lm's model, and one with swapped layers."""
    theirs, ours = resident(folder), resident(folder)
    assert swap_trunk(ours) == len(ours.layers)
    return theirs, ours


def steps(model: nn.Module, cache: list[Any], lengths: list[int]) -> Iterator[mx.array]:
    """The logits of steps of so many tokens."""
    position = 0
    for length in lengths:
        yield model(mx.array([[(7 * i + 3) % 300 for i in range(position, position + length)]]), cache=cache)
        position += length


def arrays(cache: list[Any]) -> list[mx.array]:
    return [array for _, array in tree_flatten([each.state for each in cache]) if isinstance(array, mx.array)]


@pytest.mark.parametrize(("family", "count"), [("qwen3_5_moe", 200), ("qwen3_next", 40)])
def test_steps(family: str, count: int, checkpoint: WriteFamily) -> None:
    """Steps of one to many tokens: logits and states are mlx-lm's."""
    theirs, ours = both(checkpoint(family))
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    lengths = [1, 20, *[1, 3, 1, 1, 1, 1, 8, 1, 1, 9] * 20][:count]
    for their, our in zip(steps(theirs, caches[0], lengths), steps(ours, caches[1], lengths), strict=True):
        assert error(our, their) < 1e-5
    for their, our in zip(*map(arrays, caches), strict=True):
        assert error(our, their) < 1e-5


def test_steps_emulated(emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the kernels."""
    theirs, ours = both(checkpoint("qwen3_5_moe"))
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    launches: list[str] = []
    kernel = gpu.kernel
    monkeypatch.setattr(gpu, "kernel", lambda call: launches.append(call.name) or kernel(call))
    lengths = [10, 1, 3, 1]
    for their, our in zip(steps(theirs, caches[0], lengths), steps(ours, caches[1], lengths), strict=True):
        assert error(our, their) < 1e-5
    for their, our in zip(*map(arrays, caches), strict=True):
        assert error(our, their) < 1e-5
    counts = {name: launches.count(name) for name in set(launches)}
    each = dict.fromkeys(("add_norm", "ask", "route", "combine"), 12)
    assert counts == {"gated_delta": 9, "norm_rope": 3, "attend": 3, "merge_attended": 3, "linear": 24} | each


def test_norms_are_handed_on(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first layer norms its input itself, and each one that gets another array than was foreseen."""
    _, ours = both(checkpoint("qwen3_5_moe"))
    cache = make_prompt_cache(ours)
    mx.eval(ours(mx.arange(2, 14)[None], cache=cache))
    taken = []
    take = trunk.Prepared.take
    monkeypatch.setattr(trunk.Prepared, "take", lambda self, x: taken.append(y := take(self, x)) or y)
    mx.eval(ours(mx.array([[5]]), cache=cache))
    assert [normed is None for normed in taken] == [True, False, False, False]
    x = mx.ones((1, 1, 128))
    taken.clear()
    for layer, each in zip(ours.layers, cache, strict=True):
        x = mx.array(layer(x, None, each))
    assert all(normed is None for normed in taken)


def test_demo_model_says_the_same() -> None:
    """Greedy tokens."""
    answers = []
    for swapped in (False, True):
        model = load_resident("demo/model")
        assert not swapped or swap_trunk(model) == len(model.layers)
        cache = make_prompt_cache(model)
        tokens = [11, 400, 52, 9, 1000, 77]
        logits = model(mx.array([tokens]), cache=cache)
        for _ in range(24):
            tokens.append(mx.argmax(logits[0, -1]).item())
            logits = model(mx.array([tokens[-1:]]), cache=cache)
        answers.append(tokens)
    assert answers[0] == answers[1]


def test_nothing_is_held_twice(checkpoint: WriteFamily) -> None:
    model = resident(checkpoint("qwen3_5_moe"))
    before = dict(tree_flatten(model.parameters()))
    shapes = {name: (array.shape, array.dtype) for name, array in before.items()}
    values = {name: np.array(array.view(mx.uint8)) for name, array in before.items()}
    del before
    memory = mx.get_active_memory()
    swap_trunk(model)
    mx.eval(model.parameters())
    assert mx.get_active_memory() - memory < 0.02 * memory
    after = dict(tree_flatten(model.parameters()))
    assert {name: (array.shape, array.dtype) for name, array in after.items()} == shapes
    assert all(np.array_equal(np.array(array.view(mx.uint8)), values[name]) for name, array in after.items())


def test_a_prompt_cache_does_not_notice(checkpoint: WriteFamily, tmp_path: Path) -> None:
    theirs, ours = both(checkpoint("qwen3_5_moe"))
    cache = make_prompt_cache(ours)
    for logits in steps(ours, cache, [12, 1, 1, 1]):
        mx.eval(logits)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    token = mx.array([[5]])
    assert error(theirs(token, cache=loaded), ours(token, cache=cache)) < 1e-5


def test_other_calls_are_mlx_lms(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, left padding, no cache, a first step, and long ones."""
    theirs, ours = both(checkpoint("qwen3_5_moe"))
    for layer in ours.layers:
        if layer.is_linear:
            monkeypatch.setattr(layer._way, "mix", None)
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


def test_quantised_keys_and_values(checkpoint: WriteFamily) -> None:
    theirs, ours = both(checkpoint("qwen3_5_moe"))
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
def test_other_quantisations_are_left_alone(quantization: dict[str, Any] | None, checkpoint: WriteFamily) -> None:
    affine = quantization is not None and "mode" not in quantization
    model = resident(checkpoint("qwen3_5_moe", quantization))
    assert swap_trunk(model) == (len(model.layers) if affine else 0)


def test_mixed_bits_are_left_alone(checkpoint: WriteFamily) -> None:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if path.endswith(("in_proj_a", "shared_expert.up_proj")):
            return {"bits": 8, "group_size": 64}
        return hasattr(module, "to_quantized")

    model = resident(checkpoint("qwen3_5_moe", predicate=predicate))
    assert swap_trunk(model) == 1  # the one that attends
    assert [isinstance(layer, FewLaunches) for layer in model.layers] == [False] * 3 + [True]


def test_adapters(checkpoint: WriteFamily) -> None:
    """Layers with adapters are left alone, and layers that get some later go mlx-lm's way from then on."""
    theirs, early, late = (resident(checkpoint("qwen3_5_moe")) for _ in range(3))
    assert swap_trunk(late) == 4
    for model in (theirs, early, late):
        mx.random.seed(1)
        linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
        for name, array in tree_flatten(model.trainable_parameters()):
            if name.endswith("lora_b"):
                model.update(tree_unflatten([(name, mx.random.normal(array.shape))]))
    assert swap_trunk(early) == 2
    caches = [make_prompt_cache(model) for model in (theirs, early, late)]
    for wanted, *others in zip(*map(partial(steps, lengths=[5, 1, 1]), (theirs, early, late), caches), strict=True):
        assert all(error(other, wanted) < 1e-5 for other in others)


def test_another_dtype(checkpoint: WriteFamily) -> None:
    theirs, ours = both(checkpoint("qwen3_5_moe"))
    for model in (theirs, ours):
        model.set_dtype(mx.float16)
    caches = [make_prompt_cache(model) for model in (theirs, ours)]
    for their, our in zip(*map(partial(steps, lengths=[2, 1]), (theirs, ours), caches), strict=True):
        assert mx.array_equal(our, their)


def test_other_families_are_left_alone(checkpoint: WriteFamily) -> None:
    assert swap_trunk(resident(checkpoint("qwen3_moe"))) == 0


@pytest.mark.metal
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_gpu(family: str, on_gpu: None, checkpoint: WriteFamily) -> None:
    """A loaded model decodes in few launches, streamed or not."""
    folder = checkpoint(family)
    models = [resident(folder), streamed(folder), streamed(folder, 1)]
    assert all(isinstance(layer, FewLaunches) for model in models[1:] for layer in model.layers)
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
def test_bfloat16_on_gpu(kind: str, on_gpu: None) -> None:
    """Of the 397B model's layers, as close to float32 as mlx-lm's own, which is computed on the GPU, too."""
    mx.random.seed(3)
    settings = DIMS["397b"] | {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "type": "default"}}
    layer = random_layer(qwen3_5.TextModelArgs.from_dict(settings), KINDS[kind], mx.bfloat16)
    cache = cache_of(layer, 300, mx.bfloat16)
    ours, wide = copy.deepcopy(layer), copy.deepcopy(layer)
    assert swap_trunk(ours) == 1
    wide.set_dtype(mx.float32)
    wide_cache = copy.deepcopy(cache)
    if kind == "attention":
        wide_cache.keys, wide_cache.values = (each.astype(mx.float32) for each in (cache.keys, cache.values))
    else:
        wide_cache[0] = cache[0].astype(mx.float32)
    errors = []
    for _ in range(16):  # a near tie of two experts may be decided either way
        x = mx.random.normal((1, 1, 4096)).astype(mx.bfloat16)
        wanted = wide(x.astype(mx.float32), None, copy.deepcopy(wide_cache)) - x
        theirs, our = (each(x, None, copy.deepcopy(cache)) - x for each in (layer, ours))
        errors.append([error(theirs, wanted), error(our, wanted)])
    theirs_mean, our_mean = np.mean(errors, axis=0)
    assert our_mean < 1.1 * theirs_mean
