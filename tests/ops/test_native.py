"""The native CPU kernels against float64, against MLX's own operations and against mlx-lm's models."""

import itertools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from benchmarks.exact import load_resident
from flashmoe_mlx.layers.native_cpu import Attention, GatedDeltaNet, use_native
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.ops import fused as fused_module
from flashmoe_mlx.ops import native as native_module
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.native import Kernels
from flashmoe_mlx.streaming.slot_map import NO_SLOT
from flashmoe_mlx.system.package_data import data_dir
from tests.conftest import WriteFamily
from tests.layers.test_fused_decoder import FAMILIES, arrays, both, check_kernels, check_route, normal, steps
from tests.ops.test_products import BITS, dequantized, error, float64, quantized
from tests.support.oracle import PROMPT, assert_same, distance, resident, run, streamed


@pytest.fixture
def threads(native: Kernels) -> Iterator[Any]:
    """Sets their number, for one test."""
    yield native.set_threads
    native.set_threads(1 << 10)  # as many as there are


def shapes(**more: Any) -> Any:
    return given(
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from([32, 64, 128]),
        stored=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
        tokens=st.integers(1, 20),
        top_k=st.integers(1, 5),
        rows=st.integers(16, 70),  # of a few sums one may be near 0, and its relative error large
        groups=st.integers(1, 12),
        seed=st.integers(0, 2**20),
        **more,
    )


quickly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@shapes()
def test_like_the_twins(
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
    """Every kernel is as near to float64 as 1e-6, and to its twin; and a pair of token and slot is computed alike
    whatever is computed with it."""
    columns = groups * group_size
    key = mx.random.split(mx.random.key(seed), 4)
    slots = mx.random.randint(0, 5, (tokens, top_k), key=key[0]).astype(mx.uint32)
    x = mx.random.normal((tokens, columns), key=key[1])
    hidden = mx.random.normal((tokens, top_k, columns), key=key[2])
    scores = mx.softmax(mx.random.normal((tokens, top_k), key=key[3]), axis=-1)
    gate, up = (quantized(5, rows, columns, group_size, bits, stored, seed + part) for part in (1, 2))
    wide_gate, wide_up = (widened(matrix) for matrix in (gate, up))

    dense_gate, dense_up = (dequantized(matrix)[np.array(slots)] for matrix in (gate, up))
    gated = np.einsum("tkrc,tc->tkr", dense_gate, float64(x))
    wanted = gated / (1 + np.exp(-gated)) * np.einsum("tkrc,tc->tkr", dense_up, float64(x))
    together = ops.gate_up(x, slots, gate, up)
    assert error(together, wanted) < 2e-6  # two products multiplied
    assert error(together, float64(ops.gate_up_twin(x, slots, wide_gate, wide_up))) < 2e-6
    assert mx.array_equal(together[-1:, -1:], ops.gate_up(x[-1:], slots[-1:, -1:], gate, up))

    wanted = np.einsum("tkrc,tkc->tkr", dense_up, float64(hidden))
    together = ops.matvec(hidden, slots, up)
    assert error(together, wanted) < 1e-6
    assert error(together, float64(ops.matvec_twin(hidden, slots, wide_up))) < 1e-6
    assert mx.array_equal(together[-1:, -1:], ops.matvec(hidden[-1:, -1:], slots[-1:, -1:], up))

    some = mx.where(mx.arange(top_k) % 2 == 0, slots, NO_SLOT)
    here = (some != NO_SLOT)[..., None]
    assert mx.array_equal(ops.matvec(hidden, some, up), here * together)
    assert mx.array_equal(ops.gate_up(x, some, gate, up), here * ops.gate_up(x, slots, gate, up))

    together = ops.down(hidden, slots, scores, up)
    assert error(together, (wanted * float64(scores)[..., None]).sum(1)) < 1e-6
    assert mx.array_equal(together[-1:], ops.down(hidden[-1:], slots[-1:], scores[-1:], up))

    matrix = (up.weight[1], up.scales[1], up.biases[1], group_size, bits)
    numbers = mx.array([[0, rows - 1], [3, rows]], mx.uint32)
    embedded = native.embed(numbers, *matrix)
    assert error(embedded, dequantized(up)[1][np.minimum(np.array(numbers), rows - 1)]) < 1e-6
    together = ops.linear(hidden, *matrix)
    assert error(together, float64(hidden) @ dequantized(up)[1].T) < 1e-6
    assert mx.array_equal(together[-1, -1], ops.linear(hidden[-1, -1], *matrix))


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_instruction_sets(name: str, native: Kernels) -> None:
    """All sets that this machine has are right; the best is what the other tests run."""
    best = native.instruction_set()
    if not native.choose_instruction_set(name):
        pytest.skip(f"this CPU has no {name}")
    try:
        for bits, group_size, tokens in itertools.product(BITS, (32, 64, 128), (1, 6)):
            matrix = quantized(2, 37, 3 * group_size, group_size, bits, mx.bfloat16, bits)
            x = mx.random.normal((tokens, 1, 3 * group_size), key=mx.random.key(tokens))
            y = ops.matvec(x, mx.ones((tokens, 1), mx.uint32), matrix)
            assert error(y, float64(x) @ dequantized(matrix)[1].T) < 1e-6
    finally:
        assert native.choose_instruction_set(best)


def widened(matrix: Quantized) -> Quantized:
    """The same matrices with scales in float32, which MLX's operations are exact with."""
    return matrix._replace(scales=matrix.scales.astype(mx.float32), biases=matrix.biases.astype(mx.float32))


@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_do_not_change_a_bit(threads: Any, tokens: int) -> None:
    x = mx.random.normal((tokens, 512), key=mx.random.key(0))
    slots = mx.random.randint(0, 6, (tokens, 4), key=mx.random.key(1)).astype(mx.uint32)
    gate, up = (quantized(6, 200, 512, 64, 4, mx.bfloat16, key) for key in (1, 2))
    outputs = []
    for count in (1, 2, 1 << 10):
        threads(count)
        outputs += [
            mx.concatenate([ops.gate_up(x, slots, gate, up), ops.matvec(mx.repeat(x[:, None], 4, 1), slots, up)])
        ]
        mx.eval(outputs)
    assert mx.array_equal(outputs[0], outputs[1])
    assert mx.array_equal(outputs[0], outputs[2])


def test_wrong_operands(native: Kernels) -> None:
    """The kernels read what they are given: an operand that does not fit is an error, not a wrong address."""
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
    with pytest.raises(ValueError, match="no operands of attention"):
        native.attention(vectors, vectors[:, :, :2], vectors[:, :, :2], 1.0, True)
    with pytest.raises(ValueError, match="must be float32"):
        native.attention(vectors, vectors, vectors[:, :, :0], 1.0, True)
    with pytest.raises(TypeError):
        native.matvec(np.ones((1, 1, 128)), slots, *matrix)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_family(family: str, native: Kernels, checkpoint: WriteFamily) -> None:
    """Of mlx-lm's model every logit within 1e-5, and greedy tokens; of another budget every bit."""
    folder = checkpoint(family)
    oracle, actual = run(resident(folder), tokens=16), run(streamed(folder), tokens=16)
    assert actual.tokens == oracle.tokens
    assert distance(actual.logits, oracle.logits) < 1e-5
    assert_same(run(streamed(folder, 0.25), tokens=16), actual)


def test_operands_that_are_no_rows(native: Kernels) -> None:
    """Slices and transposed arrays are computed with as what they show."""
    matrix = quantized(1, 16, 64, 32, 4, mx.float32, 0)
    wide = mx.random.normal((3, 5, 128), key=mx.random.key(0))
    weight = mx.concatenate([matrix.weight[0], matrix.weight[0]], axis=1)[:, :8]
    for x in (wide[:, ::2, 64:], wide[..., ::2], wide.transpose(1, 0, 2)[..., :64]):
        expected = native.linear(mx.array(np.array(x)), matrix.weight[0], matrix.scales[0], matrix.biases[0], 32, 4)
        assert mx.array_equal(native.linear(x, weight, matrix.scales[0], matrix.biases[0], 32, 4), expected)
        norm = mx.random.normal((64,), key=mx.random.key(1))
        assert error(native.rms_norm(x, norm, 1e-6), float64(mx.fast.rms_norm(x, norm, 1e-6))) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_delta_net(native: Kernels, batch: int) -> None:
    """GatedDeltaNet in one kernel is mlx-lm's: a prompt, tokens after it, and what its cache remembers."""
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
    use_native(ours)
    assert type(ours) is GatedDeltaNet
    caches = [ArraysCache(size=2) for _ in range(2)]
    for step, tokens in enumerate((7, 1, 2, 1)):
        x = mx.random.normal((batch, tokens, 64), key=mx.random.key(step))
        wanted, actual = (layer(x, None, cache) for layer, cache in zip((theirs, ours), caches, strict=True))
        assert error(actual, float64(wanted)) < 2e-6
        for remembered, expected in zip(caches[1].cache, caches[0].cache, strict=True):
            assert error(remembered, float64(expected)) < 2e-6
    assert error(ours(x), float64(theirs(x))) < 2e-6
    mask = mx.arange(2)[None] >= mx.arange(batch)[:, None]  # of sequences of different lengths: mlx-lm's way
    x = mx.repeat(x, 2, 1)
    assert mx.array_equal(ours(x, mask), theirs(x, mask))


def test_delta_net_and_threads(threads: Any) -> None:
    shapes = [(1, 5, 392), (1, 3, 256), (1, 4, 32, 32), (256, 4, 1), (4,), (4,), (32,)]
    layout = [(0, 32), (64, 32), (128, 64), (256, 64), (384, 2), (388, 2)]
    operands = [mx.random.normal(shape, key=mx.random.key(number)) for number, shape in enumerate(shapes)]
    outputs = []
    for count in (1, 1 << 10):
        threads(count)
        outputs.append(native_module.kernels().delta_net(*operands, layout, 1e-6))
        mx.eval(outputs)
    assert all(mx.array_equal(one, all_) for one, all_ in zip(*outputs, strict=True))


def test_trunk(native: Kernels) -> None:
    """What lies between the products of a layer, against its twins."""
    check_kernels(mx.float32, tokens=1, dim=32, key_heads=2, share=2, hidden=160, top_k=4)
    check_kernels(mx.float32, tokens=5, dim=64, key_heads=1, share=3, hidden=515, top_k=10)
    for experts, top_k, normalize in ((16, 4, True), (65, 10, False), (64, 1, True)):
        for logits in (random := 2 * normal(1, 1, 3, experts + 1), mx.round(random), mx.zeros_like(random)):
            check_route(mx.float32, experts, top_k, normalize, logits)
    for number in ("nan", "inf"):  # a broken model's logits still name experts that exist, each of them once
        chosen, _ = native.route(mx.full((17,), float(number)), 4, True)
        assert len(set(chosen.tolist())) == 4
        assert mx.all(chosen < 16).item()


def test_fused_knows_the_newest_shapes(native: Kernels) -> None:
    """A prompt's waves ask for many shapes; decoding's is one operation all the same."""
    mx.eval(weight := mx.ones((32,)))
    fused = Fused(lambda x, y: native.add_norm(x, y, weight, 1e-6))
    for tokens in (*range(1, 20), 1, 1):
        x, y = mx.random.normal((1, tokens, 32)), mx.ones((1, tokens, 32))
        for actual, wanted in zip(fused(x, y), native.add_norm(x, y, weight, 1e-6), strict=True):
            assert mx.array_equal(actual, wanted)
    assert len(fused._chains) == fused_module._MOST_CHAINS
    assert fused._chains[0]((x, y[:, :1])) is not None
    with pytest.raises(ValueError, match="twice"):
        native.Chain((x, x), native.add_norm(x, x, weight, 1e-6))
    assert mx.array_equal(fused(x, x)[0], 2 * x)


def test_cache_in_half_precision(native: Kernels, checkpoint: WriteFamily) -> None:
    """A prompt that a GPU has read, in bfloat16, may be gone on with."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_steps(family: str, native: Kernels, checkpoint: WriteFamily) -> None:
    """Layers in few launches: logits and states are mlx-lm's."""
    models = both(checkpoint(family))
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
def test_attention(
    threads: Any, native: Kernels, batch: int, heads: int, key_heads: int, tokens: int, seen: int, size: int
) -> None:
    """As near to float64 as MLX's own, from rows of a cache; and a token is computed alike with whatever else."""
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


def test_attention_layer(native: Kernels) -> None:
    """Gated attention with one kernel is mlx-lm's: a prompt, tokens after it, and with a mask of its own."""
    args = qwen3_5.TextModelArgs(hidden_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=32)
    theirs, ours = (qwen3_next.Qwen3NextAttention(args) for _ in range(2))
    ours.update(theirs.parameters())
    use_native(ours)
    assert type(ours) is Attention
    caches = [KVCache() for _ in range(2)]
    for step, tokens in enumerate((7, 1, 2, 1)):
        x = mx.random.normal((3, tokens, 64), key=mx.random.key(step))
        mask = "causal" if tokens > 1 else None
        wanted, actual = (layer(x, mask, cache) for layer, cache in zip((theirs, ours), caches, strict=True))
        assert error(actual, float64(wanted)) < 2e-6
    x = mx.repeat(x, 2, 1)
    mask = mx.tril(mx.ones((2, 2), mx.bool_))  # mlx-lm's way
    assert error(ours(x, mask), float64(theirs(x, mask))) < 2e-6
    assert error(ours(x, "causal"), float64(theirs(x, mask))) < 2e-6


def test_demo_model(native: Kernels) -> None:
    folder = data_dir("demo") / "model"
    oracle, actual = run(load_resident(str(folder)), tokens=16), run(streamed(folder), tokens=16)
    assert actual.tokens == oracle.tokens
    assert distance(actual.logits, oracle.logits) < 1e-5


def test_no_second_copy(native: Kernels, checkpoint: WriteFamily) -> None:
    """A model takes the memory that it takes without the kernels."""
    folder = checkpoint("qwen3_5_moe")
    model = streamed(folder)
    assert any(isinstance(module, StreamedSwitchGLU) for module in model.modules())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.eval(model(mx.array([PROMPT])))
    mx.clear_cache()
    assert mx.get_active_memory() - before < 1e5


def test_without_the_extension(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was built, a model computes with MLX's operations, and one line tells what could be done."""
    monkeypatch.undo()  # of the fixture that hides the kernels
    import_module = native_module.import_module

    def without(name: str) -> Any:
        if name == "flashmoe_mlx._native":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(native_module, "import_module", without)
    monkeypatch.setattr(native_module, "kernels", native_module.kernels.__wrapped__)
    with pytest.warns(UserWarning, match=r"not built, and without them .* run pip install again$"):
        assert native_module.kernels() is None


def test_another_mlx(native: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were built for another version of MLX are not called."""
    monkeypatch.setattr(native_module, "version", lambda name: "0.99.0")
    with pytest.warns(UserWarning, match=rf"built for MLX {native.mlx_version}, and this is 0\.99\.0"):
        assert native_module.kernels.__wrapped__() is None
