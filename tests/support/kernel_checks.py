"""Comparisons of every kernel of a backend with its reference or with float64."""

from typing import Any

import mlx.core as mx

from flashmoe_mlx.ops.attention import Heads, decode_attention, norm_rope
from flashmoe_mlx.ops.dispatch import Backend, Operation
from flashmoe_mlx.ops.gated_delta import GatedDelta, Layout, gated_delta
from flashmoe_mlx.ops.norm import Norm, add_norm, combine
from flashmoe_mlx.ops.products import gate_up, linear, matvec
from flashmoe_mlx.ops.routing import route, router_and_shared
from flashmoe_mlx.streaming.slot_map import NO_SLOT
from tests.support.operands import (
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

FUSED_FAMILIES = ("qwen3_5_moe", "qwen3_next")
OPERATIONS: tuple[Operation[..., Any], ...] = (
    *(gate_up, matvec, linear, gated_delta, norm_rope, decode_attention),
    *(add_norm, combine, router_and_shared, route),
)
"""All operations."""

PRODUCT_ERROR = {mx.float32: 1e-5, mx.float16: 2**-11 + 1e-5, mx.bfloat16: 2**-8 + 1e-5}
"""Largest error of a product. Half precision allows one rounding."""

ROUNDING = {mx.float32: 2e-6, mx.float16: 2**-11 + 2e-6, mx.bfloat16: 2**-8 + 2e-6}
"""Largest error of an operation between products."""


def check_products(
    backend: Backend,
    dtype: mx.Dtype,
    bits: int,
    group_size: int,
    tokens: int,
    top_k: int,
    rows: int,
    groups: int,
    seed: int,
) -> None:
    """Compare every product with float64 on random operands."""
    columns = groups * group_size
    key = mx.random.split(mx.random.key(seed), 3)
    slots = mx.random.randint(0, 5, (tokens, top_k), key=key[0]).astype(mx.uint32)
    x = mx.random.normal((tokens, columns), key=key[1]).astype(dtype)
    hidden = mx.random.normal((tokens, top_k, columns), key=key[2]).astype(dtype)
    gate, up = (quantized(5, rows, columns, group_size, bits, dtype, seed + part) for part in (1, 2))
    swiglu, multiply, dense = gate_up.on(backend), matvec.on(backend), linear.on(backend)

    assert error(swiglu(x, slots, gate, up), float64_swiglu(x, slots, gate, up)) < PRODUCT_ERROR[dtype]
    assert error(multiply(hidden, slots, up), float64_matvec(hidden, slots, up)) < PRODUCT_ERROR[dtype]
    if gate_up.serves(backend, x, slots, gate, up):
        some = mx.where(mx.arange(top_k) % 2 == 0, slots, NO_SLOT)
        here = (some != NO_SLOT)[..., None]
        assert mx.array_equal(multiply(hidden, some, up), here * multiply(hidden, slots, up))
        assert mx.array_equal(swiglu(x, some, gate, up), here * swiglu(x, slots, gate, up))
    # MLX's own product rounds half precision more than once.
    if dtype == mx.float32 or linear.serves(backend, x[:1], one(up, 1)):
        assert error(dense(x[:1], one(up, 1)), float64(x[:1]) @ dequantized(up)[1].T) < PRODUCT_ERROR[dtype]


def layout_of(family: str, key_heads: int, share: int, dim: int) -> Layout:
    """Return the columns of a family's projections, spelled out."""
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


def check_between_products(
    backend: Backend, dtype: mx.Dtype, *, tokens: int, dim: int, key_heads: int, share: int, hidden: int, top_k: int
) -> None:
    """Compare every other kernel with what its reference computes in float32 of the same operands."""

    def wide(value: Any) -> Any:
        if isinstance(value, mx.array):
            return value.astype(mx.float32) if value.dtype == dtype else value
        return type(value)(*map(wide, value)) if hasattr(value, "_fields") else value

    def same(operation: Operation[..., Any], *operands: Any) -> None:
        assert operation.serves(backend, *operands)
        actual, wanted = operation.on(backend)(*operands), operation.reference(*map(wide, operands))
        for a, w in zip(*([each] if isinstance(each, mx.array) else each for each in (actual, wanted)), strict=True):
            assert error(a, w) < ROUNDING[dtype], operation.__name__

    def random(key: int, *shape: int) -> mx.array:
        return normal(key, *shape).astype(dtype)

    heads = key_heads * share
    channels = (2 * key_heads + heads) * dim
    for family in FUSED_FAMILIES:
        same(
            gated_delta,
            random(1, 1, tokens, channels + heads * dim + 2 * heads),
            random(2, 1, 3, channels),
            normal(3, 1, heads, dim, dim),
            GatedDelta(
                random(4, channels, 4, 1),
                mx.log(mx.random.uniform(0, 16, (heads,), key=mx.random.key(5))),
                random(6, heads),
                Norm(random(7, dim), 1e-6),
                layout_of(family, key_heads, share, dim),
            ),
        )
    projected = random(8, 1, tokens, (2 * heads + 2 * key_heads) * dim)
    rotation = Heads(heads, key_heads, random(9, dim), random(10, dim), 1e-6, dim // 4, 1e7, 1.0)
    same(norm_rope, projected, mx.array([7]), rotation)
    for capacity, position in ((256, 0), (256, 256 - tokens), (300, 100)):
        same(
            decode_attention,
            random(11, 1, heads, tokens, dim),
            *(random(12 + i, 1, key_heads, capacity, dim) for i in range(2)),
            mx.array([position]),
            projected,
            dim**-0.5,
        )
    x, y, weight = (random(14 + i, 1, tokens, hidden) for i in range(3))
    norm = Norm(weight[0, 0], 1e-6)
    same(add_norm, x, y, norm)
    experts, scores = (random(17, 1, tokens, *shape) for shape in ((top_k, hidden), (top_k + 1,)))
    same(combine, x, experts, scores, y, norm)
    for router_bits, bits, rows in ((8, 4, 33), (4, 2, 64)):
        x = random(19, 1, tokens, 192)
        matrices = [
            one(quantized(1, count, 192, 64, width, dtype, count), 0)
            for count, width in ((17, router_bits), (rows, bits), (rows, bits))
        ]
        actual = router_and_shared.on(backend)(x, *matrices)
        wanted = router_and_shared.reference(x.astype(mx.float32), *map(widened, matrices))
        for a, w in zip(actual, wanted, strict=True):
            assert error(a, w) < ROUNDING[dtype]


def check_route(backend: Backend, dtype: mx.Dtype, top_k: int, normalize: bool, logits: mx.array) -> None:
    """Require the reference's experts, in any order, and their scores."""
    logits = logits.astype(dtype)
    experts, scores = route.on(backend)(logits, top_k, normalize)
    wanted, wanted_scores = route.reference(logits, top_k, normalize)
    assert experts.dtype == wanted.dtype and scores.dtype == wanted_scores.dtype
    ours, theirs = (mx.argsort(each, axis=-1) for each in (experts, wanted))
    assert mx.array_equal(mx.take_along_axis(experts, ours, -1), mx.take_along_axis(wanted, theirs, -1))
    sorted_ours, sorted_theirs = mx.take_along_axis(scores, ours, -1), mx.take_along_axis(wanted_scores, theirs, -1)
    assert error(sorted_ours, sorted_theirs) < 2 * ROUNDING[dtype]
    assert error(scores[..., -1:], wanted_scores[..., -1:]) < 2 * ROUNDING[dtype]
