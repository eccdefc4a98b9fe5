"""The router of a decode step: its logits together with the shared expert's, and the choice of experts."""

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.dispatch import GPUS, Backend, Operation
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.products import gpu_serves, linear

# Lanes of a SIMD group that hold the chosen experts.
_MAX_TOP_K = 16


def _router_and_shared_on_gpu(x: mx.array, router: Quantized, gate: Quantized, up: Quantized) -> bool:
    return gate.format == up.format and gpu_serves(x, x[..., :1], router, gate, up)


@Operation
def router_and_shared(x: mx.array, router: Quantized, gate: Quantized, up: Quantized) -> tuple[mx.array, mx.array]:
    """Compute the router's logits and the shared expert's hidden activations, which read the same input.

    Args:
        x (mx.array): ``[1, tokens, columns]``.
        router (Quantized): ``[experts + 1, columns]``; the last row is the shared expert's gate.
        gate (Quantized): The shared expert's, ``[intermediate, columns]``.
        up (Quantized): Like ``gate``. Kernels need the same bits and group size.

    Returns:
        tuple: Logits ``[1, tokens, experts + 1]`` and hidden activations ``[1, tokens, intermediate]``.
    """
    hidden = nn.silu(linear.reference(x, gate)) * linear.reference(x, up)
    return linear.reference(x, router), hidden


@router_and_shared.kernel(Backend.NATIVE, serves=lambda x, *_: x.dtype == mx.float32)
def _(x: mx.array, router: Quantized, gate: Quantized, up: Quantized) -> tuple[mx.array, mx.array]:
    kernels = native.require()
    if gate.format == up.format:
        return kernels.router_and_shared(x, *router.arrays, *router.format, *gate.arrays, *up.arrays, *gate.format)
    return kernels.linear(x, *router), nn.silu(kernels.linear(x, *gate)) * kernels.linear(x, *up)


@router_and_shared.kernel(*GPUS, serves=_router_and_shared_on_gpu)
def _(x: mx.array, router: Quantized, gate: Quantized, up: Quantized) -> tuple[mx.array, mx.array]:
    tokens = x.shape[1]
    rows_per_simdgroup = 2 if gate.bits == 2 else 1
    hidden, logits = gpu.run(
        _ROUTER_AND_SHARED,
        [x, *gate.arrays, *up.arrays, *router.arrays],
        [(1, tokens, gate.rows), (1, tokens, router.rows)],
        threadgroups=(-(-gate.rows // (2 * rows_per_simdgroup)) + -(-router.rows // 4), tokens),
        simdgroups=2,
        template={
            "BITS": gate.bits,
            "GROUP": gate.group_size,
            "ROWS": rows_per_simdgroup,
            "ROUTER_BITS": router.bits,
            "ROUTER_GROUP": router.group_size,
        },
    )
    return logits, hidden


def _route_on_gpu(logits: mx.array, top_k: int, normalize: bool) -> bool:
    return top_k <= _MAX_TOP_K and logits.size >= gpu.DEVICE_MEMORY


@Operation
def route(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """Choose each token's experts by softmax probability; of equal ones those with higher numbers.

    Args:
        logits (mx.array): The experts', then the shared expert's, ``[1, tokens, experts + 1]``.
        top_k (int): Experts per token.
        normalize (bool): Scale a token's scores to sum to 1.

    Returns:
        tuple: Expert numbers ``[1, tokens, top_k]``, uint32, in no defined order; and their scores, followed by the
        shared expert's (a sigmoid), ``[1, tokens, top_k + 1]``, dtype of ``logits``.
    """
    gates = mx.softmax(logits[..., :-1], axis=-1, precise=True)
    experts = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
    scores = mx.take_along_axis(gates, experts, axis=-1)
    if normalize:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts, mx.concatenate([scores, mx.sigmoid(logits[..., -1:])], axis=-1)


@route.kernel(Backend.NATIVE, serves=lambda logits, top_k, normalize: logits.dtype == mx.float32)
def _(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    return native.require().route(logits, top_k, normalize)


@route.kernel(*GPUS, serves=_route_on_gpu)
def _(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    _, tokens, width = logits.shape
    experts, scores = gpu.run(
        _ROUTE,
        [logits],
        [(1, tokens, top_k), (1, tokens, top_k + 1)],
        dtypes=[mx.uint32, logits.dtype],
        threadgroups=(tokens, 1),
        simdgroups=1,
        template={"EXPERTS": width - 1, "TOP_K": top_k, "NORMALIZE": normalize},
    )
    return experts, scores


_ROUTE = gpu.Kernel(
    "route",
    ("logits",),
    """
    route<T, EXPERTS, TOP_K, NORMALIZE>(
        logits, experts, scores, threadgroup_position_in_grid.x, thread_index_in_simdgroup);
    """,
    ("experts", "scores"),
)
_ROUTER_AND_SHARED = gpu.Kernel(
    "router_and_shared",
    (
        *("x", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
        *("router_weight", "router_scales", "router_biases"),
    ),
    """
    router_and_shared<T, BITS, GROUP, ROWS, ROUTER_BITS, ROUTER_GROUP, SIMDGROUPS>(
        x, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases,
        router_weight, router_scales, router_biases, hidden, logits,
        x_shape[2], gate_scales_shape[0], router_scales_shape[0], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ("hidden", "logits"),
    uses=("quantized", "gate_up", "matvec", "linear"),
)
