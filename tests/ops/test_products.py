"""The kernels against float64: on any machine through the emulator, and on a GPU (`-m metal`)."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.model import budget
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.dispatch import MAX_PAIRS, MAX_TOP_K, has_kernel
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.streaming.slot_map import NO_SLOT
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, resident, streamed

BITS = (2, 3, 4, 5, 6, 8)
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2**-11 + 1e-5, mx.bfloat16: 2**-8 + 1e-5}
"""The half precisions have room for one rounding."""


def quantized(slots: int, rows: int, columns: int, group_size: int, bits: int, dtype: mx.Dtype, key: int) -> Quantized:
    weight = mx.random.normal((slots, rows, columns), key=mx.random.key(key)) * columns**-0.5
    parts = mx.quantize(weight, group_size, bits, stream=mx.cpu)
    return Quantized(parts[0], parts[1].astype(dtype), parts[2].astype(dtype), group_size, bits)


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def dequantized(matrix: Quantized) -> np.ndarray:
    """``[slots, rows, columns]`` in float64; the bits of a row are one stream, lowest first."""
    stream = np.unpackbits(np.array(matrix.weight).view(np.uint8), axis=-1, bitorder="little")
    q = stream.reshape(*matrix.weight.shape[:2], -1, matrix.bits) @ (1 << np.arange(matrix.bits))
    scales, biases = (np.repeat(float64(part), matrix.group_size, -1) for part in matrix[1:3])
    return scales * q + biases


def error(actual: mx.array, wanted: np.ndarray) -> float:
    assert actual.shape == wanted.shape
    return float(np.linalg.norm(float64(actual) - wanted) / np.linalg.norm(wanted))


def check_kernels(
    dtype: mx.Dtype, bits: int, group_size: int, tokens: int, top_k: int, rows: int, groups: int, seed: int
) -> None:
    """Compare every kernel with float64 on random operands."""
    columns = groups * group_size
    key = mx.random.split(mx.random.key(seed), 4)
    slots = mx.random.randint(0, 5, (tokens, top_k), key=key[0]).astype(mx.uint32)
    x = mx.random.normal((tokens, columns), key=key[1]).astype(dtype)
    hidden = mx.random.normal((tokens, top_k, columns), key=key[2]).astype(dtype)
    scores = mx.softmax(mx.random.normal((tokens, top_k), key=key[3]), axis=-1)
    gate, up = (quantized(5, rows, columns, group_size, bits, dtype, seed + part) for part in (1, 2))

    dense_gate, dense_up = (dequantized(matrix)[np.array(slots)] for matrix in (gate, up))
    gated = np.einsum("tkrc,tc->tkr", dense_gate, float64(x))
    wanted = gated / (1 + np.exp(-gated)) * np.einsum("tkrc,tc->tkr", dense_up, float64(x))
    assert error(ops.gate_up(x, slots, gate, up), wanted) < TOLERANCE[dtype]

    wanted = np.einsum("tkrc,tkc->tkr", dense_up, float64(hidden))
    assert error(ops.matvec(hidden, slots, up), wanted) < TOLERANCE[dtype]
    if has_kernel(x, slots, gate, up):
        some = mx.where(mx.arange(top_k) % 2 == 0, slots, NO_SLOT)
        here = (some != NO_SLOT)[..., None]
        assert mx.array_equal(ops.matvec(hidden, some, up), here * ops.matvec(hidden, slots, up))
        assert mx.array_equal(ops.gate_up(x, some, gate, up), here * ops.gate_up(x, slots, gate, up))
    dense = (up.weight[1], up.scales[1], up.biases[1], group_size, bits)
    if dense[1].size >= gpu.DEVICE_MEMORY:
        assert error(ops.linear(x[:1], *dense), float64(x[:1]) @ dequantized(up)[1].T) < TOLERANCE[dtype]
    weighted = (wanted * float64(scores)[..., None]).sum(1)
    assert error(ops.down(hidden, slots, scores, up), weighted) < TOLERANCE[dtype]


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([32, 64, 128]),
    tokens=st.integers(1, 8),
    top_k=st.integers(1, MAX_TOP_K),
    rows=st.integers(2, 40),
    groups=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_emulated(emulated: None, **operands: int) -> None:
    check_kernels(**operands)


@pytest.mark.metal
@pytest.mark.parametrize(
    ("dtype", "bits", "group_size"),
    [(mx.bfloat16, bits, 64) for bits in BITS]
    + [(mx.float32, 4, 32), (mx.float16, 4, 128), (mx.float32, 3, 64), (mx.float16, 8, 64)],
)
def test_on_gpu(dtype: mx.Dtype, bits: int, group_size: int, on_gpu: None) -> None:
    for tokens, rows, columns in ((1, 1024, 4096), (3, 37, 128), (8, 50, 1152), (1, 300, 512)):
        check_kernels(dtype, bits, group_size, tokens, 10, rows, columns // group_size, seed=columns)


@pytest.mark.metal
def test_dispatch_on_gpu(on_gpu: None) -> None:
    """Few pairs go to kernels, many to the twin; they agree."""
    gate, up = (quantized(4, 64, 128, 64, 4, mx.bfloat16, key) for key in (1, 2))
    x = mx.random.normal((MAX_PAIRS + 1, 128)).astype(mx.bfloat16)
    slots = mx.random.randint(0, 4, (MAX_PAIRS + 1, 1)).astype(mx.uint32)
    assert has_kernel(x[:1], slots[:1], gate, up)
    assert not has_kernel(x, slots, gate, up)
    assert not has_kernel(x.astype(mx.float32), slots[:1], gate, up)
    few, many = ops.gate_up(x[:1], slots[:1], gate, up), ops.gate_up(x, slots, gate, up)[:1]
    assert error(few, float64(many)) < 1e-2


def test_dispatch(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel cannot take goes to the twin."""
    gate, up = (quantized(4, 16, 128, 64, 4, mx.float32, key) for key in (1, 2))
    x, slots = mx.ones((1, 128)), mx.zeros((1, 2), mx.uint32)
    assert has_kernel(x, slots, gate, up)
    assert not has_kernel(x, mx.zeros((1, 0), mx.uint32), gate)
    assert not has_kernel(x, mx.zeros((1, MAX_TOP_K + 1), mx.uint32), gate)
    assert not has_kernel(x, mx.zeros((MAX_PAIRS + 1, 1), mx.uint32), gate)
    assert not has_kernel(x.astype(mx.bfloat16), slots, gate)
    assert not has_kernel(x, slots, quantized(1, 3, 128, 64, 4, mx.float32, 1))
    for other in (quantized(4, 16, 128, 64, 8, mx.float32, 3), quantized(4, 16, 128, 32, 4, mx.float32, 3)):
        assert mx.array_equal(ops.gate_up(x, slots, gate, other), ops.gate_up_twin(x, slots, gate, other))
    monkeypatch.setattr(gpu, "on_gpu", lambda: False)
    assert not has_kernel(x, slots, gate, up)


def test_gate_and_up_of_different_bits(emulated: None, checkpoint: WriteFamily) -> None:
    """As recipes of mixed bits make them."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        return {"bits": 8, "group_size": 64} if path.endswith("up_proj") else hasattr(module, "to_quantized")

    folder = checkpoint("qwen3_moe", predicate=predicate)
    prompt = mx.array([PROMPT[:3]])
    assert mx.array_equal(streamed(folder)(prompt), resident(folder)(prompt))


@pytest.mark.parametrize(("bits", "group_size"), [(bits, 64) for bits in BITS] + [(4, 32), (4, 128)])
def test_twins(bits: int, group_size: int) -> None:
    """What a CPU computes is the same thing."""
    check_kernels(mx.float32, bits, group_size, tokens=3, top_k=4, rows=24, groups=3, seed=bits)


def test_pairs_do_not_depend_on_each_other(emulated: None) -> None:
    matrices = [
        quantized(6, *shape, 32, 4, mx.bfloat16, key) for key, shape in enumerate([(64, 96), (64, 96), (96, 64)])
    ]
    x = mx.random.normal((3, 96), key=mx.random.key(7)).astype(mx.bfloat16)
    slots = mx.array([[0, 5, 2], [5, 1, 1], [3, 4, 0]], mx.uint32)
    together = ops.experts(x, slots, *matrices)
    for token, k in np.ndindex(3, 3):
        alone = ops.experts(x[token : token + 1], slots[token : token + 1, k : k + 1], *matrices)
        assert mx.array_equal(together[token, k], alone[0, 0])


def test_layer(emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed model decodes with the kernels, and the same whatever the budget: in waves, with hits, with misses."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 3)
    launches: list[str] = []
    kernel = gpu.kernel
    monkeypatch.setattr(gpu, "kernel", lambda call: launches.append(call.name) or kernel(call))
    folder = checkpoint("qwen3_moe")
    outputs = [model(mx.array([PROMPT[:3]])) for model in (streamed(folder), streamed(folder, 0.75))]
    assert launches.count("gate_up") == launches.count("matvec") > 4
    assert mx.array_equal(*outputs)
    monkeypatch.setattr(gpu, "on_gpu", lambda: False)
    twin = streamed(folder)(mx.array([PROMPT[:3]]))
    assert error(outputs[0], float64(twin)) < 1e-5


@pytest.mark.metal
def test_layer_on_gpu(on_gpu: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a GPU, where compiled kernels must see what is read into slots after they were built."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 5)
    folder = checkpoint("qwen3_moe")
    models = [streamed(folder), streamed(folder, 0.75), streamed(folder, 1), resident(folder)]
    for token in PROMPT:
        few, many, all_, mlx_lm = (model(mx.array([[token]])) for model in models)
        assert mx.array_equal(few, many)
        assert mx.array_equal(few, all_)
        assert error(few, float64(mlx_lm)) < 1e-3


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_other_activations(family: str, emulated: None, checkpoint: WriteFamily) -> None:
    """Experts that are no plain SwiGLU are left to mlx-lm's layer."""
    layers = [m for _, m in streamed(checkpoint(family)).named_modules() if isinstance(m, StreamedSwitchGLU)]
    assert layers
    assert not any(layer._experts._matrices for layer in layers)
