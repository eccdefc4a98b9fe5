"""The router: logits together with the shared expert, and the choice of experts."""

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import MAX_TOP_K, has_kernel, native_kernels
from flashmoe_mlx.ops.matrices import Dense
from flashmoe_mlx.ops.products import linear


def ask(x: mx.array, router: Dense, gate: Dense, up: Dense) -> tuple[mx.array, mx.array]:
    """What a block of experts begins with: the router's logits, and the hidden activations of the shared expert.

    Args:
        x (mx.array): ``[1, tokens, columns]``.
        router (Dense): of ``experts + 1`` rows.
        gate (Dense): the shared expert's.
        up (Dense): like ``gate``; the kernel wants the same bits and groups, too.

    Returns:
        tuple: ``[1, tokens, experts + 1]`` and ``[1, tokens, gate's rows]``.
    """
    tokens = x.shape[1]
    if gate[3:] == up[3:] and (kernels := native_kernels(x)):
        formats = (router.group_size, router.bits), (gate.group_size, gate.bits)
        return kernels.ask(x, *router[:3], *formats[0], *gate[:3], *up[:3], *formats[1])
    if not gpu.on_gpu() or gate[3:] != up[3:] or not has_kernel(x, x[..., :1], router, gate, up):
        return ask_twin(x, router, gate, up)
    rows = 2 if gate.bits == 2 else 1  # of a simdgroup
    hidden_size, logits_size = gate.weight.shape[0], router.weight.shape[0]
    hidden, logits = gpu.run(
        _ASK,
        [x, *gate[:3], *up[:3], *router[:3]],
        [(1, tokens, hidden_size), (1, tokens, logits_size)],
        threadgroups=(-(-hidden_size // (2 * rows)) + -(-logits_size // 4), tokens),
        simdgroups=2,
        template={
            "BITS": gate.bits,
            "GROUP": gate.group_size,
            "ROWS": rows,
            "ROUTER_BITS": router.bits,
            "ROUTER_GROUP": router.group_size,
        },
    )
    return logits, hidden


def ask_twin(x: mx.array, router: Dense, gate: Dense, up: Dense) -> tuple[mx.array, mx.array]:
    """:func:`ask` in MLX operations, as mlx-lm's blocks compute it."""
    return linear(x, *router), nn.silu(linear(x, *gate)) * linear(x, *up)


def route(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """The experts of each token: the most likely ones, of equal ones those of higher numbers.

    Args:
        logits (mx.array): those of the experts, then that of the shared expert, ``[1, tokens, experts + 1]``.
        top_k (int): how many.
        normalize (bool): whether the scores of a token's experts add up to 1.

    Returns:
        tuple: expert numbers ``[1, tokens, top_k]``, uint32, in no order that counts; and their scores, followed by the
        shared expert's, ``[1, tokens, top_k + 1]``, of the dtype of ``logits``.
    """
    if kernels := native_kernels(logits):
        return kernels.route(logits, top_k, normalize)
    if not gpu.on_gpu() or top_k > MAX_TOP_K or logits.size < gpu.DEVICE_MEMORY:
        return route_twin(logits, top_k, normalize)
    _, tokens, logits_size = logits.shape
    chosen, scores = gpu.run(
        _ROUTE,
        [logits],
        [(1, tokens, top_k), (1, tokens, top_k + 1)],
        dtypes=[mx.uint32, logits.dtype],
        threadgroups=(tokens, 1),
        simdgroups=1,
        template={"EXPERTS": logits_size - 1, "TOP_K": top_k, "NORMALIZE": normalize},
    )
    return chosen, scores


def route_twin(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """:func:`route` in MLX operations, as mlx-lm's blocks compute it."""
    gates = mx.softmax(logits[..., :-1], axis=-1, precise=True)
    experts = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
    scores = mx.take_along_axis(gates, experts, axis=-1)
    if normalize:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts, mx.concatenate([scores, mx.sigmoid(logits[..., -1:])], axis=-1)


_ROUTE = gpu.Call(
    "route",
    ("logits",),
    """
    route<T, EXPERTS, TOP_K, NORMALIZE>(
        logits, experts, scores, threadgroup_position_in_grid.x, thread_index_in_simdgroup);
    """,
    ("experts", "scores"),
)

_ASK = gpu.Call(
    "ask",
    (
        *("x", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
        *("router_weight", "router_scales", "router_biases"),
    ),
    """
        ask<T, BITS, GROUP, ROWS, ROUTER_BITS, ROUTER_GROUP, SIMDGROUPS>(
            x, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases,
            router_weight, router_scales, router_biases, hidden, logits,
            x_shape[2], gate_scales_shape[0], router_scales_shape[0], threadgroup_position_in_grid.y,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("hidden", "logits"),
    uses=("quantized", "gate_up", "matvec", "linear"),
)
