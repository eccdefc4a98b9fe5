"""Products against float64: on any machine through the emulator, and on a GPU (``-m metal``)."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.model import budget
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import GPUS, Backend
from flashmoe_mlx.ops.products import MAX_PAIRS, gate_up, gpu_serves, matvec, swiglu_experts
from tests.conftest import WriteFamily
from tests.support.kernel_checks import PRODUCT_ERROR, check_products
from tests.support.operands import BITS, error, float64, quantized
from tests.support.oracle import EACH_BACKEND, PROMPT, mlx_lm_model, streamed

# Tokens, experts of a token, rows and columns.
SIZES = ((1, 10, 1024, 4096), (3, 10, 37, 128), (8, 16, 50, 1152), (1, 16, 300, 512))
ON_METAL = pytest.mark.parametrize("backend", [Backend.METAL], ids=["metal"], indirect=True)


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    backend=st.sampled_from(GPUS),
    dtype=st.sampled_from(list(PRODUCT_ERROR)),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([32, 64, 128]),
    tokens=st.integers(1, 8),
    top_k=st.integers(1, 20),
    rows=st.integers(2, 40),
    groups=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_emulated_kernels_are_near_float64(emulated: None, **operands: Any) -> None:
    """With the launches of both, and the kernel that only CUDA has."""
    check_products(**operands)


@pytest.mark.metal
@pytest.mark.parametrize(
    ("dtype", "bits", "group_size"),
    [(mx.bfloat16, bits, 64) for bits in BITS]
    + [(mx.float32, 4, 32), (mx.float16, 4, 128), (mx.float32, 3, 64), (mx.float16, 8, 64)],
)
def test_gpu_kernels_are_near_float64(dtype: mx.Dtype, bits: int, group_size: int, on_gpu: Backend) -> None:
    # An NVIDIA GPU runs Metal's launches as well.
    for backend in {on_gpu, Backend.METAL}:
        for tokens, top_k, rows, columns in SIZES:
            check_products(backend, dtype, bits, group_size, tokens, top_k, rows, columns // group_size, seed=columns)


@pytest.mark.parametrize(("bits", "group_size"), [(bits, 64) for bits in BITS] + [(4, 32), (4, 128)])
@EACH_BACKEND
def test_cpu_products_are_near_float64(bits: int, group_size: int, backend: Backend) -> None:
    check_products(backend, mx.float32, bits, group_size, tokens=3, top_k=4, rows=24, groups=3, seed=bits)


@pytest.mark.metal
def test_few_pairs_go_to_kernels_on_a_gpu(on_gpu: Backend) -> None:
    gate, up = (quantized(4, 64, 128, 64, 4, mx.bfloat16, key) for key in (1, 2))
    x = mx.random.normal((MAX_PAIRS + 1, 128)).astype(mx.bfloat16)
    slots = mx.random.randint(0, 4, (MAX_PAIRS + 1, 1)).astype(mx.uint32)
    assert gate_up.serves(on_gpu, x[:1], slots[:1], gate, up)
    assert not gate_up.serves(on_gpu, x, slots, gate, up)
    compute = gate_up.on(on_gpu)
    few, many = compute(x[:1], slots[:1], gate, up), compute(x, slots, gate, up)[:1]
    assert error(few, many) < 1e-2


def test_the_reference_computes_what_a_gpu_kernel_cannot(emulated: None) -> None:
    gate, up = (quantized(4, 16, 128, 64, 4, mx.float32, key) for key in (1, 2))
    x, slots = mx.ones((1, 128)), mx.zeros((1, 2), mx.uint32)
    assert gpu_serves(x, slots, gate, up)
    assert not gpu_serves(x, mx.zeros((1, 0), mx.uint32), gate)
    assert not gpu_serves(x, mx.zeros((MAX_PAIRS + 1, 1), mx.uint32), gate)
    assert not gpu_serves(x.astype(mx.bfloat16), slots, gate)
    assert not gpu_serves(x, slots, quantized(1, 3, 128, 64, 4, mx.float32, 1))
    for other in (quantized(4, 16, 128, 64, 8, mx.float32, 3), quantized(4, 16, 128, 32, 4, mx.float32, 3)):
        assert not gate_up.serves(Backend.METAL, x, slots, gate, other)
        actual = gate_up.on(Backend.METAL)(x, slots, gate, other)
        assert mx.array_equal(actual, gate_up.reference(x, slots, gate, other))
    assert not matvec.serves(Backend.REFERENCE, x[:, None], slots, gate)


@pytest.mark.parametrize("backend", [Backend.METAL, Backend.REFERENCE], ids=["metal", "reference"], indirect=True)
def test_gate_and_up_of_different_bits_are_mlx_lms(backend: Backend, emulated: None, checkpoint: WriteFamily) -> None:
    """Recipes of mixed bits make such checkpoints."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        return {"bits": 8, "group_size": 64} if path.endswith("up_proj") else hasattr(module, "to_quantized")

    folder = checkpoint("qwen3_moe", predicate=predicate)
    prompt = mx.array([PROMPT[:3]])
    assert mx.array_equal(streamed(folder)(prompt), mlx_lm_model(folder)(prompt))


def test_pairs_do_not_depend_on_each_other(emulated: None) -> None:
    matrices = [
        quantized(6, *shape, 32, 4, mx.bfloat16, key) for key, shape in enumerate([(64, 96), (64, 96), (96, 64)])
    ]
    x = mx.random.normal((3, 96), key=mx.random.key(7)).astype(mx.bfloat16)
    slots = mx.array([[0, 5, 2], [5, 1, 1], [3, 4, 0]], mx.uint32)
    experts = swiglu_experts(*matrices, Backend.METAL)
    together = experts(x, slots)
    for token, k in np.ndindex(3, 3):
        alone = experts(x[token : token + 1], slots[token : token + 1, k : k + 1])
        assert mx.array_equal(together[token, k], alone[0, 0])


@ON_METAL
def test_an_emulated_model_has_the_same_bits_at_every_budget(
    backend: Backend, emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In waves, with hits and with misses."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 3)
    launches: list[str] = []
    compiled = gpu.compiled
    monkeypatch.setattr(gpu, "compiled", lambda kernel: launches.append(kernel.name) or compiled(kernel))
    folder = checkpoint("qwen3_moe")
    outputs = [model(mx.array([PROMPT[:3]])) for model in (streamed(folder), streamed(folder, 0.75))]
    assert launches.count("gate_up") == launches.count("matvec") > 4
    assert mx.array_equal(*outputs)
    assert error(outputs[0], mlx_lm_model(folder)(mx.array([PROMPT[:3]]))) < 1e-5


@pytest.mark.metal
def test_a_model_on_a_gpu_has_the_same_bits_at_every_budget(
    on_gpu: Backend, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled kernels must see what is read into slots after they were built."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 5)
    folder = checkpoint("qwen3_moe")
    models = [streamed(folder), streamed(folder, 0.75), streamed(folder, 1), mlx_lm_model(folder)]
    for token in PROMPT:
        few, many, all_, mlx_lm = (model(mx.array([[token]])) for model in models)
        assert mx.array_equal(few, many)
        assert mx.array_equal(few, all_)
        assert error(few, float64(mlx_lm)) < 1e-3


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
@ON_METAL
def test_other_activations_are_left_to_mlx_lm(
    family: str, backend: Backend, emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[str] = []
    monkeypatch.setattr(gpu, "compiled", lambda kernel: launches.append(kernel.name))
    model = streamed(checkpoint(family))
    assert any(isinstance(module, StreamedSwitchGLU) for _, module in model.named_modules())
    mx.eval(model(mx.array([PROMPT[:3]])))
    assert launches == []
