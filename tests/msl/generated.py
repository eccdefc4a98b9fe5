"""The Metal text of every kernel, as MLX generates it for the dimensions of real models. Runs no kernel."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.attention import Heads, decode_attention, norm_rope
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.gated_delta import GatedDelta, gated_delta
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.norm import Norm, add_norm, combine
from flashmoe_mlx.ops.products import gate_up, matvec
from flashmoe_mlx.ops.routing import route, router_and_shared
from tests.support.metal_text import metal_text
from tests.support.operands import BITS

DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
GROUPS = (32, 64, 128)
TOP_K = (4, 8, 10, 16)


class Text(NamedTuple):
    """A kernel's text, and how it is launched.

    Args:
        kernel (str): Name of the kernel.
        source (str): Metal.
        threads (int): Of a threadgroup.
        template (tuple): Names and values of the template's parameters.
    """

    kernel: str
    source: str
    threads: int
    template: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        values = (f"{name}={DTYPES.get(value, value)}" for name, value in self.template)
        return f"{self.kernel}<{', '.join(values)}>, {self.threads} threads"


class Dims(NamedTuple):
    """Dimensions of a model."""

    hidden: int
    intermediate: int
    shared: int
    experts: int
    top_k: int
    heads: int
    key_heads: int
    head_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_dim: int


MODELS = (
    # Qwen3.5-397B-A17B
    Dims(4096, 1024, 1024, 512, 10, 32, 2, 256, 16, 64, 128),
    # Qwen3.5-35B-A3B
    Dims(2048, 512, 512, 256, 8, 16, 2, 256, 16, 32, 128),
    # The demo's.
    Dims(256, 64, 64, 64, 8, 4, 2, 64, 4, 8, 32),
)


def generated(
    patch: pytest.MonkeyPatch, dtype: mx.Dtype, *, whole: bool = False, backend: Backend = Backend.METAL
) -> list[Text]:
    """Return every text of a dtype once.

    Args:
        patch (pytest.MonkeyPatch): For the time of the call.
        dtype (mx.Dtype): Of activations.
        whole (bool): All combinations of bits, group sizes and numbers of experts, instead of each one in turn.
        backend (Backend): Whose launches. Default: Metal's.
    """
    found: dict[str, Text] = {}

    def recorder(kernel: gpu.Kernel) -> Callable[..., list[mx.array]]:
        def record(inputs: list[mx.array], **launch: Any) -> list[mx.array]:
            source = metal_text(compiled(kernel), inputs, **launch)
            found[source] = Text(kernel.name, source, launch["threadgroup"][0], tuple(launch["template"]))
            return [mx.zeros(*each) for each in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)]

        return record

    with patch.context() as patched:
        patched.setattr(mx.cuda, "is_available", lambda: False)
        compiled = gpu.compiled.__wrapped__
        patched.setattr(gpu, "compiled", recorder)
        for operation, *operands in _calls(dtype, whole):
            assert operation.serves(backend, *operands), operation.__name__
            operation.on(backend)(*operands)
    return list(found.values())


def _calls(dtype: mx.Dtype, whole: bool) -> Iterator[tuple[Any, ...]]:
    """Yield operations and operands."""
    if whole:
        formats = [(bits, group, top_k) for bits, group, top_k in product(BITS, GROUPS, TOP_K)]
    else:
        formats = [(bits, 64, 10) for bits in BITS] + [(4, 32, 4), (4, 128, 8), (2, 64, 16)]
    for dims in MODELS:
        yield from _products(dims, dtype, formats)
        yield from _between_products(dims, dtype, 1, TOP_K if whole or dims == MODELS[0] else (dims.top_k,))
        # With more tokens, small inputs move to device memory.
        yield from _between_products(dims, dtype, 8, (4, dims.top_k))


def _quantized(rows: int, columns: int, group_size: int, bits: int, dtype: mx.Dtype, *stack: int) -> Quantized:
    scales = mx.zeros((*stack, rows, columns // group_size), dtype)
    return Quantized(mx.zeros((*stack, rows, columns * bits // 32), mx.uint32), scales, scales, group_size, bits)


def _products(dims: Dims, dtype: mx.Dtype, formats: list[tuple[int, int, int]]) -> Iterator[tuple[Any, ...]]:
    hidden, intermediate, shared, experts, *_ = dims
    for bits, group_size, top_k in formats:
        # The demo's expert has 64 columns.
        if intermediate % group_size:
            continue
        x, slots = mx.zeros((1, hidden), dtype), mx.zeros((1, top_k), mx.uint32)
        gate = _quantized(intermediate, hidden, group_size, bits, dtype, 12)
        yield gate_up, x, slots, gate, gate
        down = _quantized(hidden, intermediate, group_size, bits, dtype, 12)
        yield matvec, mx.zeros((1, top_k, intermediate), dtype), slots, down
        shared_gate = _quantized(shared, hidden, group_size, bits, dtype)
        for router_bits in {8, bits}:
            router = _quantized(experts + 1, hidden, group_size, router_bits, dtype)
            yield router_and_shared, x[None], router, shared_gate, shared_gate


def _between_products(
    dims: Dims, dtype: mx.Dtype, tokens: int, each_top_k: tuple[int, ...]
) -> Iterator[tuple[Any, ...]]:
    def zeros(*shape: int) -> mx.array:
        return mx.zeros(shape, dtype)

    hidden, _, _, experts, _, heads, key_heads, dim, linear_key_heads, linear_heads, linear_dim = dims
    channels = (2 * linear_key_heads + linear_heads) * linear_dim
    norm = Norm(zeros(hidden), 1e-6)
    x = zeros(1, tokens, hidden)
    for decays in {dtype, mx.float32}:
        yield (
            gated_delta,
            zeros(1, tokens, channels + linear_heads * (linear_dim + 2)),
            zeros(1, 3, channels),
            mx.zeros((1, linear_heads, linear_dim, linear_dim)),
            GatedDelta(
                zeros(channels, 4, 1),
                mx.zeros(linear_heads, decays),
                zeros(linear_heads),
                Norm(zeros(linear_dim), 1e-6),
                tuple((0, 1) for _ in range(6)),
            ),
        )
    projected = zeros(1, tokens, 2 * (heads + key_heads) * dim)
    position = mx.array([7])
    yield norm_rope, projected, position, Heads(heads, key_heads, zeros(dim), zeros(dim), 1e-6, dim // 4, 1e7, 1.0)
    cache = zeros(1, key_heads, 4096, dim)
    yield decode_attention, zeros(1, heads, tokens, dim), cache, cache, position, projected, dim**-0.5
    yield add_norm, x, x, norm
    for top_k in each_top_k:
        yield route, zeros(1, tokens, experts + 1), top_k, True
        yield combine, x, zeros(1, tokens, top_k, hidden), zeros(1, tokens, top_k + 1), x, norm
