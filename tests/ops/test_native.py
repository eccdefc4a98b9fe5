"""The native CPU kernels against float64, against MLX's own operations and against mlx-lm's models."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from flashmoe_mlx.layers.native_cpu import Attention, GatedDeltaNet, use_native_kernels
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.ops import fused as fused_module
from flashmoe_mlx.ops import native as native_module
from flashmoe_mlx.ops.dispatch import Backend, choose_backend
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.native import Kernels
from flashmoe_mlx.ops.products import gate_up, linear, matvec
from flashmoe_mlx.streaming.slot_map import NO_SLOT
from flashmoe_mlx.system.package_data import data_dir
from tests.conftest import WriteFamily
from tests.support.fused import arrays, plain_and_fused, steps
from tests.support.kernel_checks import FUSED_FAMILIES, check_between_products, check_route
from tests.support.operands import (
    BITS,
    dequantized,
    error,
    float64,
    float64_matvec,
    float64_swiglu,
    normal,
    one,
    quantized,
    widened,
)
from tests.support.oracle import PROMPT, assert_same, distance, mlx_lm_model, run, streamed

swiglu, multiply, dense = (operation.on(Backend.NATIVE) for operation in (gate_up, matvec, linear))


@pytest.fixture
def threads(native: Kernels) -> Iterator[Any]:
    """Set the number of threads, for one test."""
    yield native.set_threads
    # As many as there are cores.
    native.set_threads(1 << 10)


def shapes(**more: Any) -> Any:
    return given(
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from([32, 64, 128]),
        stored=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
        tokens=st.integers(1, 20),
        top_k=st.integers(1, 5),
        # Of a few sums one may be near 0, and its relative error large.
        rows=st.integers(16, 70),
        groups=st.integers(1, 12),
        seed=st.integers(0, 2**20),
        **more,
    )


quickly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@shapes()
def test_products_are_near_float64_and_independent(
    native: Kernels,
    bits: int,
    group_size: int,
    stored: mx.Dtype,
    tokens: int,
    top_k: int,
    rows: int,
    groups: int,
    seed: int,
) -> None:
    """A pair of token and slot has the same bits whatever is computed with it."""
    columns = groups * group_size
    key = mx.random.split(mx.random.key(seed), 3)
    slots = mx.random.randint(0, 5, (tokens, top_k), key=key[0]).astype(mx.uint32)
    x = mx.random.normal((tokens, columns), key=key[1])
    hidden = mx.random.normal((tokens, top_k, columns), key=key[2])
    gate, up = (quantized(5, rows, columns, group_size, bits, stored, seed + part) for part in (1, 2))
    wide_gate, wide_up = (widened(matrix) for matrix in (gate, up))

    together = swiglu(x, slots, gate, up)
    # The product of two products.
    assert error(together, float64_swiglu(x, slots, gate, up)) < 2e-6
    assert error(together, gate_up.reference(x, slots, wide_gate, wide_up)) < 2e-6
    assert mx.array_equal(together[-1:, -1:], swiglu(x[-1:], slots[-1:, -1:], gate, up))

    together = multiply(hidden, slots, up)
    assert error(together, float64_matvec(hidden, slots, up)) < 1e-6
    assert error(together, matvec.reference(hidden, slots, wide_up)) < 1e-6
    assert mx.array_equal(together[-1:, -1:], multiply(hidden[-1:, -1:], slots[-1:, -1:], up))

    some = mx.where(mx.arange(top_k) % 2 == 0, slots, NO_SLOT)
    here = (some != NO_SLOT)[..., None]
    assert mx.array_equal(multiply(hidden, some, up), here * together)
    assert mx.array_equal(swiglu(x, some, gate, up), here * swiglu(x, slots, gate, up))

    matrix = one(up, 1)
    numbers = mx.array([[0, rows - 1], [3, rows]], mx.uint32)
    embedded = native.embed(numbers, *matrix)
    assert error(embedded, dequantized(up)[1][np.minimum(np.array(numbers), rows - 1)]) < 1e-6
    together = dense(hidden, matrix)
    assert error(together, float64(hidden) @ dequantized(up)[1].T) < 1e-6
    assert mx.array_equal(together[-1, -1], dense(hidden[-1, -1], matrix))


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set_is_near_float64(name: str, native: Kernels) -> None:
    """Other tests run the best set of this machine."""
    best = native.instruction_set()
    if not native.choose_instruction_set(name):
        pytest.skip(f"this CPU has no {name}")
    try:
        for bits, group_size, tokens in itertools.product(BITS, (32, 64, 128), (1, 6)):
            matrix = quantized(2, 37, 3 * group_size, group_size, bits, mx.bfloat16, bits)
            x = mx.random.normal((tokens, 1, 3 * group_size), key=mx.random.key(tokens))
            y = multiply(x, mx.ones((tokens, 1), mx.uint32), matrix)
            assert error(y, float64(x) @ dequantized(matrix)[1].T) < 1e-6
    finally:
        assert native.choose_instruction_set(best)


@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_do_not_change_a_bit(threads: Any, tokens: int) -> None:
    x = mx.random.normal((tokens, 512), key=mx.random.key(0))
    slots = mx.random.randint(0, 6, (tokens, 4), key=mx.random.key(1)).astype(mx.uint32)
    gate, up = (quantized(6, 200, 512, 64, 4, mx.bfloat16, key) for key in (1, 2))
    outputs = []
    for count in (1, 2, 1 << 10):
        threads(count)
        outputs += [mx.concatenate([swiglu(x, slots, gate, up), multiply(mx.repeat(x[:, None], 4, 1), slots, up)])]
        mx.eval(outputs)
    assert mx.array_equal(outputs[0], outputs[1])
    assert mx.array_equal(outputs[0], outputs[2])


def test_wrong_operands_are_errors(native: Kernels) -> None:
    """Kernels read raw memory, so an operand that does not fit must never reach them."""
    matrix = quantized(2, 8, 128, 64, 4, mx.float32, 0)
    x, slots = mx.ones((1, 1, 128)), mx.zeros((1, 1), mx.uint32)
    with pytest.raises(ValueError, match="x must be float32"):
        native.matvec(x.astype(mx.bfloat16), slots, *matrix)
    with pytest.raises(ValueError, match="weight does not fit x"):
        native.matvec(x[..., :64], slots, *matrix)
    with pytest.raises(ValueError, match="slots must be uint32"):
        native.matvec(x, slots.astype(mx.int32), *matrix)
    with pytest.raises(ValueError, match="bits must be"):
        native.matvec(x, slots, *matrix[:4], 7)
    with pytest.raises(ValueError, match="scales do not fit"):
        native.matvec(x, slots, matrix.weight, matrix.scales[..., :1], matrix.biases, 64, 4)
    vectors = mx.ones((1, 2, 3, 16))
    with pytest.raises(ValueError, match="needs a key for each query"):
        native.attention(vectors, vectors[:, :, :2], vectors[:, :, :2], 1.0, True)
    with pytest.raises(ValueError, match="must be float32"):
        native.attention(vectors, vectors, vectors[:, :, :0], 1.0, True)
    with pytest.raises(TypeError):
        native.matvec(np.ones((1, 1, 128)), slots, *matrix)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_model_is_near_mlx_lm_and_equal_at_every_budget(
    family: str, native: Kernels, checkpoint: WriteFamily
) -> None:
    folder = checkpoint(family)
    oracle, actual = run(mlx_lm_model(folder), tokens=16), run(streamed(folder), tokens=16)
    assert actual.tokens == oracle.tokens
    assert distance(actual.logits, oracle.logits) < 1e-5
    assert_same(run(streamed(folder, 0.25), tokens=16), actual)


def test_slices_and_transposed_arrays_are_valid_operands(native: Kernels) -> None:
    matrix = quantized(1, 16, 64, 32, 4, mx.float32, 0)
    wide = mx.random.normal((3, 5, 128), key=mx.random.key(0))
    weight = mx.concatenate([matrix.weight[0], matrix.weight[0]], axis=1)[:, :8]
    for x in (wide[:, ::2, 64:], wide[..., ::2], wide.transpose(1, 0, 2)[..., :64]):
        expected = native.linear(mx.array(np.array(x)), matrix.weight[0], matrix.scales[0], matrix.biases[0], 32, 4)
        assert mx.array_equal(native.linear(x, weight, matrix.scales[0], matrix.biases[0], 32, 4), expected)
        norm = mx.random.normal((64,), key=mx.random.key(1))
        assert error(native.rms_norm(x, norm, 1e-6), float64(mx.fast.rms_norm(x, norm, 1e-6))) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_gated_delta_net_is_mlx_lms(native: Kernels, batch: int) -> None:
    """A prompt, tokens after it, and the states of its cache."""
    args = qwen3_5.TextModelArgs(
        hidden_size=64,
        linear_num_value_heads=6,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=48,
        linear_conv_kernel_dim=4,
    )
    theirs, ours = qwen3_5.GatedDeltaNet(args), qwen3_5.GatedDeltaNet(args)
    theirs.norm.weight = mx.random.normal((48,), key=mx.random.key(1))
    ours.update(theirs.parameters())
    use_native_kernels(ours)
    assert type(ours) is GatedDeltaNet
    caches = [ArraysCache(size=2) for _ in range(2)]
    for step, tokens in enumerate((7, 1, 2, 1)):
        x = mx.random.normal((batch, tokens, 64), key=mx.random.key(step))
        wanted, actual = (layer(x, None, cache) for layer, cache in zip((theirs, ours), caches, strict=True))
        assert error(actual, float64(wanted)) < 2e-6
        for remembered, expected in zip(caches[1].cache, caches[0].cache, strict=True):
            assert error(remembered, float64(expected)) < 2e-6
    assert error(ours(x), float64(theirs(x))) < 2e-6
    # Sequences of different lengths are computed by mlx-lm's own code.
    mask = mx.arange(2)[None] >= mx.arange(batch)[:, None]
    x = mx.repeat(x, 2, 1)
    assert mx.array_equal(ours(x, mask), theirs(x, mask))


def test_gated_delta_does_not_depend_on_threads(threads: Any) -> None:
    shapes = [(1, 5, 392), (1, 3, 256), (1, 4, 32, 32), (256, 4, 1), (4,), (4,), (32,)]
    layout = [(0, 32), (64, 32), (128, 64), (256, 64), (384, 2), (388, 2)]
    operands = [mx.random.normal(shape, key=mx.random.key(number)) for number, shape in enumerate(shapes)]
    outputs = []
    for count in (1, 1 << 10):
        threads(count)
        outputs.append(native_module.kernels().gated_delta(*operands, layout, 1e-6))
        mx.eval(outputs)
    assert all(mx.array_equal(one, all_) for one, all_ in zip(*outputs, strict=True))


def test_kernels_between_products_are_near_their_references(native: Kernels) -> None:
    check_between_products(Backend.NATIVE, mx.float32, tokens=1, dim=32, key_heads=2, share=2, hidden=160, top_k=4)
    check_between_products(Backend.NATIVE, mx.float32, tokens=5, dim=64, key_heads=1, share=3, hidden=515, top_k=10)
    for experts, top_k, normalize in ((16, 4, True), (65, 10, False), (64, 1, True)):
        for logits in (random := 2 * normal(1, 1, 3, experts + 1), mx.round(random), mx.zeros_like(random)):
            check_route(Backend.NATIVE, mx.float32, top_k, normalize, logits)
    # A broken model's logits still name existing experts, each of them once.
    for number in ("nan", "inf"):
        chosen, _ = native.route(mx.full((17,), float(number)), 4, True)
        assert len(set(chosen.tolist())) == 4
        assert mx.all(chosen < 16).item()


def test_fused_keeps_the_newest_shapes(native: Kernels) -> None:
    """The waves of a prompt ask for many shapes; a decode step is one operation all the same."""
    mx.eval(weight := mx.ones((32,)))
    fused = Fused(lambda x, y: native.add_norm(x, y, weight, 1e-6), Backend.NATIVE)
    for tokens in (*range(1, 20), 1, 1):
        x, y = mx.random.normal((1, tokens, 32)), mx.ones((1, tokens, 32))
        for actual, wanted in zip(fused(x, y), native.add_norm(x, y, weight, 1e-6), strict=True):
            assert mx.array_equal(actual, wanted)
    assert len(fused._chains) == fused_module._MAX_CHAINS
    assert fused._chains[0]((x, y[:, :1])) is not None
    with pytest.raises(ValueError, match="twice"):
        native.Chain((x, x), native.add_norm(x, x, weight, 1e-6))
    assert mx.array_equal(fused(x, x)[0], 2 * x)


def test_a_cache_in_half_precision_can_be_continued(native: Kernels, checkpoint: WriteFamily) -> None:
    """Such as one that a GPU has filled in bfloat16."""
    folder = checkpoint("qwen3_5_moe")
    logits = []
    for dtype in (mx.float32, mx.bfloat16):
        model = streamed(folder, 1)
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        for each in cache:
            if isinstance(each, ArraysCache):
                each.cache = [array.astype(dtype) for array in each.cache]
            else:
                each.keys, each.values = each.keys.astype(dtype), each.values.astype(dtype)
        logits.append([model(mx.array([[token]]), cache=cache) for token in (5, 6, 7)][-1])
    assert distance(logits[1], logits[0]) < 2e-2


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_fused_steps_are_near_mlx_lms(family: str, native: Kernels, checkpoint: WriteFamily) -> None:
    """Logits and states."""
    models = plain_and_fused(checkpoint(family), Backend.NATIVE)
    caches = [make_prompt_cache(model) for model in models]
    theirs, ours = (steps(model, cache, [20, 1, 1, 3, 1, 8, 1]) for model, cache in zip(models, caches, strict=True))
    for wanted, actual in zip(theirs, ours, strict=True):
        assert distance(actual, wanted) < 1e-5
    for wanted, actual in zip(*map(arrays, caches), strict=True):
        assert error(actual, float64(wanted)) < 1e-5


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tokens", "seen", "size"),
    [(1, 4, 2, 1, 1, 16), (2, 6, 2, 5, 40, 48), (1, 16, 1, 3, 77, 64), (1, 3, 3, 19, 19, 128)],
)
def test_attention_is_near_float64_and_independent(
    threads: Any, native: Kernels, batch: int, heads: int, key_heads: int, tokens: int, seen: int, size: int
) -> None:
    """Keys and values are rows of a cache; a token has the same bits whatever is computed with it."""
    keys = mx.random.split(mx.random.key(seen), 3)
    q = mx.random.normal((batch, tokens, heads, size), key=keys[0]).swapaxes(1, 2)
    k, v = (mx.random.normal((batch, key_heads, seen + 9, size), key=key)[:, :, :seen] for key in keys[1:])
    causal = tokens > 1
    y = native.attention(q, k, v, size**-0.5, causal)

    wide_q, wide_k, wide_v = (float64(each) for each in (q, mx.repeat(k, heads // key_heads, 1), v))
    products = np.einsum("bhtd,bhsd->bhts", wide_q, wide_k) * size**-0.5
    if causal:
        products = np.where(np.arange(seen) <= np.arange(seen - tokens, seen)[:, None], products, -np.inf)
    weights = np.exp(products - products.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("bhts,bhsd->bthd", weights, np.repeat(wide_v, heads // key_heads, 1))
    assert error(y, wanted) < 2e-6
    mask = "causal" if causal else None
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=mask)
    assert error(y, float64(theirs.swapaxes(1, 2))) < 2e-6
    assert mx.array_equal(native.attention(q[:, :, -1:], k, v, size**-0.5, False), y[:, -1:])
    threads(1)
    assert mx.array_equal(native.attention(q, k, v, size**-0.5, causal), y)


def test_gated_attention_is_mlx_lms(native: Kernels) -> None:
    """A prompt, tokens after it, and a mask of the caller."""
    args = qwen3_5.TextModelArgs(hidden_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=32)
    theirs, ours = (qwen3_next.Qwen3NextAttention(args) for _ in range(2))
    ours.update(theirs.parameters())
    use_native_kernels(ours)
    assert type(ours) is Attention
    caches = [KVCache() for _ in range(2)]
    for step, tokens in enumerate((7, 1, 2, 1)):
        x = mx.random.normal((3, tokens, 64), key=mx.random.key(step))
        mask = "causal" if tokens > 1 else None
        wanted, actual = (layer(x, mask, cache) for layer, cache in zip((theirs, ours), caches, strict=True))
        assert error(actual, float64(wanted)) < 2e-6
    x = mx.repeat(x, 2, 1)
    mask = mx.tril(mx.ones((2, 2), mx.bool_))
    assert error(ours(x, mask), float64(theirs(x, mask))) < 2e-6
    assert error(ours(x, "causal"), float64(theirs(x, mask))) < 2e-6


def test_the_demo_model_says_what_mlx_lms_says(native: Kernels) -> None:
    folder = data_dir("demo") / "model"
    oracle, actual = run(mlx_lm_model(folder), tokens=16), run(streamed(folder), tokens=16)
    assert actual.tokens == oracle.tokens
    assert distance(actual.logits, oracle.logits) < 1e-5


def test_kernels_need_no_copy_of_the_weights(native: Kernels, checkpoint: WriteFamily) -> None:
    folder = checkpoint("qwen3_5_moe")
    model = streamed(folder)
    assert any(isinstance(module, StreamedSwitchGLU) for module in model.modules())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.eval(model(mx.array([PROMPT])))
    mx.clear_cache()
    assert mx.get_active_memory() - before < 1e5


@pytest.mark.skipif(sys.platform != "linux", reason="other systems build none")
def test_one_warning_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = native_module.import_module

    def without(name: str) -> Any:
        if name == "flashmoe_mlx._native":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(native_module, "import_module", without)
    monkeypatch.setattr(native_module, "kernels", native_module.kernels.__wrapped__)
    with pytest.warns(UserWarning, match=r"not built; without them .* run pip install again$"):
        assert choose_backend() is Backend.REFERENCE


def test_kernels_built_for_another_mlx_are_not_called(native: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "version", lambda name: "0.99.0")
    with pytest.warns(UserWarning, match=rf"built for MLX {native.mlx_version}, and this is 0\.99\.0"):
        assert native_module.kernels.__wrapped__() is None


def test_other_backends_do_not_ask_for_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking warns where none were built, and a GPU's user needs none."""
    monkeypatch.setattr(native_module, "kernels", lambda: pytest.fail("asked for native kernels"))
    for backend in (Backend.REFERENCE, Backend.METAL, Backend.CUDA):
        fused = Fused(lambda x: (2 * x,), backend)
        assert mx.array_equal(fused(mx.ones((3,)))[0], 2 * mx.ones((3,)))
