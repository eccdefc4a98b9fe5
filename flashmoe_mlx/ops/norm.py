"""RMS norms fused with what precedes them."""

import mlx.core as mx

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import native_kernels


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """A residual connection and the RMS norm behind it.

    Args:
        x (mx.array): ``[1, tokens, hidden]``.
        y (mx.array): likewise.
        weight (mx.array): of the norm, ``[hidden]``.
        eps (float): of the norm.

    Returns:
        tuple: ``x + y``, and its norm.
    """
    if kernels := native_kernels(x):
        return kernels.add_norm(x, y, weight, eps)
    _, tokens, hidden = x.shape
    if not gpu.on_gpu() or hidden % 32:
        return add_norm_twin(x, y, weight, eps)
    total, normed = gpu.run(
        _ADD_NORM,
        [x, y, weight, mx.array([eps])],
        [x.shape, x.shape],
        threadgroups=(tokens, 1),
        simdgroups=16,
        template={"HIDDEN": hidden},
    )
    return total, normed


def add_norm_twin(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """:func:`add_norm` in MLX operations."""
    total = x + y
    return total, mx.fast.rms_norm(total, weight, eps)


def combine(
    x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """The end of a layer, experts weighted and added to the residual, and the norm that the next layer begins with.

    Args:
        x (mx.array): ``[1, tokens, hidden]``.
        y (mx.array): of the routed experts, ``[1, tokens, top_k, hidden]``.
        scores (mx.array): theirs and that of the shared expert, ``[1, tokens, top_k + 1]``.
        shared (mx.array): of the shared expert, ``[1, tokens, hidden]``.
        weight (mx.array): of the norm, ``[hidden]``.
        eps (float): of the norm.

    Returns:
        tuple: ``[1, tokens, hidden]``, and its norm.
    """
    if kernels := native_kernels(x):
        return kernels.combine(x, y, scores, shared, weight, eps)
    _, tokens, hidden = x.shape
    if not gpu.on_gpu() or hidden % 32:
        return combine_twin(x, y, scores, shared, weight, eps)
    out, normed = gpu.run(
        _COMBINE,
        [x, y, scores, shared, weight, mx.array([eps])],
        [x.shape, x.shape],
        threadgroups=(tokens, 1),
        simdgroups=16,
        template={"HIDDEN": hidden, "TOP_K": y.shape[2]},
    )
    return out, normed


def combine_twin(
    x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """:func:`combine` in MLX operations, as mlx-lm's blocks compute it."""
    routed = (y * scores[..., :-1, None]).sum(axis=-2)
    return add_norm_twin(x, routed + scores[..., -1:] * shared, weight, eps)


_ADD_NORM = gpu.Call(
    "add_norm",
    ("x", "y", "weight", "eps"),
    """
        threadgroup float partial[SIMDGROUPS];
        add_norm<T, HIDDEN, SIMDGROUPS>(
            x, y, weight, eps, sum, normed, partial,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("sum", "normed"),
    uses=("quantized", "norm"),
)

_COMBINE = gpu.Call(
    "combine",
    ("x", "y", "scores", "shared", "weight", "eps"),
    """
        threadgroup float partial[SIMDGROUPS];
        combine<T, HIDDEN, TOP_K, SIMDGROUPS>(
            x, y, scores, shared, weight, eps, out, normed, partial,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("out", "normed"),
    uses=("quantized", "norm"),
)
