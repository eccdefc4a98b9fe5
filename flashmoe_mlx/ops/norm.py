"""RMS norms fused with the additions before them."""

from typing import NamedTuple

import mlx.core as mx

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.dispatch import GPUS, Backend, Operation

# Experts whose outputs a thread of `combine` loads at once on Metal: 100 registers.
_METAL_AT_ONCE = 8


class Norm(NamedTuple):
    """An RMS norm.

    Args:
        weight (mx.array): ``[hidden]``.
        eps (float): Added to the mean square.
    """

    weight: mx.array
    eps: float


def _is_float32(x: mx.array, *_: object) -> bool:
    return x.dtype == mx.float32


def _fills_simdgroups(x: mx.array, *_: object) -> bool:
    return x.shape[-1] % 32 == 0


@Operation
def add_norm(x: mx.array, y: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """Add to the residual stream and normalize the sum.

    Args:
        x (mx.array): ``[1, tokens, hidden]``.
        y (mx.array): ``[1, tokens, hidden]``.
        norm (Norm): Applied to the sum.

    Returns:
        tuple: ``x + y`` and its norm, each ``[1, tokens, hidden]``.
    """
    total = x + y
    return total, mx.fast.rms_norm(total, norm.weight, norm.eps)


@add_norm.kernel(Backend.NATIVE, serves=_is_float32)
def _(x: mx.array, y: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    return native.require().add_norm(x, y, norm.weight, norm.eps)


@add_norm.kernel(*GPUS, serves=_fills_simdgroups)
def _(x: mx.array, y: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    total, normed = gpu.run(
        _ADD_NORM,
        [x, y, norm.weight, mx.array([norm.eps])],
        [x.shape, x.shape],
        threadgroups=(x.shape[1], 1),
        simdgroups=16,
        template={"HIDDEN": x.shape[2]},
    )
    return total, normed


@Operation
def combine(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """End a layer: weight its experts, add them to the residual stream, and apply the next layer's norm.

    Args:
        x (mx.array): Residual stream ``[1, tokens, hidden]``.
        y (mx.array): Outputs of the routed experts, ``[1, tokens, top_k, hidden]``.
        scores (mx.array): Their scores, followed by the shared expert's, ``[1, tokens, top_k + 1]``.
        shared (mx.array): Output of the shared expert, ``[1, tokens, hidden]``.
        norm (Norm): Applied to the sum.

    Returns:
        tuple: The sum and its norm, each ``[1, tokens, hidden]``.
    """
    routed = (y * scores[..., :-1, None]).sum(axis=-2)
    return add_norm.reference(x, routed + scores[..., -1:] * shared, norm)


@combine.kernel(Backend.NATIVE, serves=_is_float32)
def _(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    return native.require().combine(x, y, scores, shared, norm.weight, norm.eps)


@combine.kernel(Backend.METAL, serves=_fills_simdgroups)
def _(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    # All experts at once need more registers than Apple's GPUs have.
    at_once = max(count for count in range(1, _METAL_AT_ONCE + 1) if y.shape[2] % count == 0)
    return _combine(x, y, scores, shared, norm, at_once, simdgroups=8)


@combine.kernel(Backend.CUDA, serves=_fills_simdgroups)
def _(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    return _combine(x, y, scores, shared, norm, at_once=y.shape[2], simdgroups=16)


def _combine(
    x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, norm: Norm, at_once: int, simdgroups: int
) -> tuple[mx.array, mx.array]:
    out, normed = gpu.run(
        _COMBINE,
        [x, y, scores, shared, norm.weight, mx.array([norm.eps])],
        [x.shape, x.shape],
        threadgroups=(x.shape[1], 1),
        simdgroups=simdgroups,
        template={"HIDDEN": x.shape[2], "TOP_K": y.shape[2], "AT_ONCE": at_once},
    )
    return out, normed


_ADD_NORM = gpu.Kernel(
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
_COMBINE = gpu.Kernel(
    "combine",
    ("x", "y", "scores", "shared", "weight", "eps"),
    """
    threadgroup float partial[SIMDGROUPS];
    combine<T, HIDDEN, TOP_K, AT_ONCE, SIMDGROUPS>(
        x, y, scores, shared, weight, eps, out, normed, partial,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ("out", "normed"),
    uses=("quantized", "norm"),
)
