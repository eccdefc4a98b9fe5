"""What a token costs, in few launches: one function per kernel, its twin in MLX operations, one dispatch rule.

A GPU's kernel is a file of ``kernels/``, whose README tells how it is launched and why. It takes few tokens, as in
decoding, and reads slabs in place. Activations must begin at a multiple of 16 bytes: an array of its own does, a slice
of another may not. A CPU's kernels are in ``native/`` and take any number of tokens.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import has_kernel, native_kernels
from flashmoe_mlx.ops.matrices import Quantized


def gate_up(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    """The hidden activations of SwiGLU experts: ``silu(gate[slot] x) * (up[slot] x)``, for every slot of a token.

    Args:
        x (mx.array): ``[..., columns]``.
        slots (mx.array): where the experts of each token are, ``[..., top_k]``, uint32. A product with ``NO_SLOT`` is
            zero, here and below; the twins do not know it.
        gate (Quantized): ``[slots, rows, columns]``.
        up (Quantized): like ``gate``; the kernel wants the same bits and groups, too.

    Returns:
        mx.array: ``[..., top_k, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if gate[3:] != up[3:] or not has_kernel(x, slots, gate, up):
        return gate_up_twin(x, slots, gate, up)
    if kernels := native_kernels(x):
        return kernels.gate_up(x, slots.astype(mx.uint32), *gate[:3], *up[:3], gate.group_size, gate.bits)
    return _launch(
        _GATE_UP,
        [x, slots, *gate[:3], *up[:3]],
        (*slots.shape, gate.rows),
        vectors=slots.size,
        simdgroups=2,
        tile=2 * (rows := 2 if gate.bits == 2 else 1),
        template={"BITS": gate.bits, "GROUP": gate.group_size, "ROWS": rows, "LANES": 32, "TOP_K": slots.shape[-1]},
    )


def gate_up_twin(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    """:func:`gate_up` in MLX operations, as mlx-lm's ``SwitchGLU`` computes it."""
    x = x[..., None, :]
    hidden: mx.array = nn.silu(matvec_twin(x, slots, gate)) * matvec_twin(x, slots, up)
    return hidden


def down(x: mx.array, slots: mx.array, scores: mx.array, matrix: Quantized) -> mx.array:
    """The output of a token's experts, weighted and summed: ``sum over k of scores[k] * (matrix[slots[k]] x[k])``.

    Args:
        x (mx.array): ``[tokens, top_k, columns]``.
        slots (mx.array): ``[tokens, top_k]``, uint32.
        scores (mx.array): ``[tokens, top_k]``, of any floating dtype.
        matrix (Quantized): ``[slots, rows, columns]``.

    Returns:
        mx.array: ``[tokens, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if not has_kernel(x, slots, matrix):
        return down_twin(x, slots, scores, matrix)
    if kernels := native_kernels(x):
        return kernels.down(x, slots.astype(mx.uint32), scores.astype(mx.float32), *matrix)
    tokens, top_k = slots.shape
    return _launch(
        _DOWN,
        [x, slots, scores, *matrix[:3]],
        (tokens, matrix.rows),
        vectors=tokens,
        simdgroups=top_k,
        tile=4,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": 2, "LANES": 16, "TOP_K": top_k},
    )


def down_twin(x: mx.array, slots: mx.array, scores: mx.array, matrix: Quantized) -> mx.array:
    """:func:`down` in MLX operations, as mlx-lm's blocks compute it."""
    return (matvec_twin(x, slots, matrix) * scores[..., None]).sum(axis=-2).astype(x.dtype)


def experts(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized, down: Quantized) -> mx.array:
    """SwiGLU experts, an output for each: what mlx-lm's ``SwitchGLU`` returns.

    Args:
        x (mx.array): ``[..., hidden]``.
        slots (mx.array): ``[..., top_k]``, uint32.
        gate (Quantized): ``[slots, intermediate, hidden]``.
        up (Quantized): like ``gate``.
        down (Quantized): ``[slots, hidden, intermediate]``.

    Returns:
        mx.array: ``[..., top_k, hidden]``, of the dtype of ``x``. Where kernels run, an output depends on its own
        token and expert only, not on what else is computed in the same call.
    """
    return matvec(gate_up(x, slots, gate, up), slots, down)


def matvec(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    """Products of vectors and matrices: ``matrix[slot] x`` for each slot and the vector in its place.

    With one slot a product of plain matrices is one of experts, so this serves dense layers too.

    Args:
        x (mx.array): ``[..., top_k, columns]``.
        slots (mx.array): ``[..., top_k]``, uint32.
        matrix (Quantized): ``[slots, rows, columns]``.

    Returns:
        mx.array: ``[..., top_k, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if not has_kernel(x, slots, matrix):
        return matvec_twin(x, slots, matrix)
    if kernels := native_kernels(x):
        return kernels.matvec(x, slots.astype(mx.uint32), *matrix)
    return _launch(
        _MATVEC,
        [x, slots, *matrix[:3]],
        (*slots.shape, matrix.rows),
        vectors=slots.size,
        simdgroups=4,
        tile=16,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": 2, "LANES": 16},
    )


def matvec_twin(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    """:func:`matvec` in MLX operations. ``x`` may also be broadcast to the shape of ``slots``."""
    weight, scales, biases, group_size, bits = matrix
    return mx.gather_qmm(
        x[..., None, :], weight, scales, biases, rhs_indices=slots, transpose=True, group_size=group_size, bits=bits
    ).squeeze(-2)


def linear(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """Products of vectors and one matrix, as a dense layer has them.

    Args:
        x (mx.array): ``[..., columns]``.
        weight (mx.array): ``[rows, columns * bits / 32]``, uint32; see :class:`Quantized` for the rest.

    Returns:
        mx.array: ``[..., rows]``, of the dtype of ``x``. A native kernel computes each vector by itself; a GPU's takes
            one vector, on NVIDIA's, where MLX's own product reads half as fast.
    """
    if kernels := native_kernels(x):
        return kernels.linear(x, weight, scales, biases, group_size, bits)
    if gpu.on_nvidia() and x.size == x.shape[-1] and scales.dtype == x.dtype and scales.size >= gpu.DEVICE_MEMORY:
        return _launch(
            _LINEAR,
            [x, weight, scales, biases],
            (*x.shape[:-1], len(weight)),
            vectors=1,
            simdgroups=2,
            tile=4,
            template={"BITS": bits, "GROUP": group_size, "ROWS": 2, "LANES": 32},
        )
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


_GATE_UP = gpu.Call(
    "gate_up",
    ("x", "slots", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
    """
    gate_up<T, BITS, GROUP, ROWS, LANES, TOP_K>(
        x, slots, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases, out,
        gate_scales_shape[2] * GROUP, gate_scales_shape[1], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)
_DOWN = gpu.Call(
    "down",
    ("x", "slots", "scores", "weight", "scales", "biases"),
    """
    threadgroup float partial[TOP_K * ROWS * 32 / LANES];
    down<T, BITS, GROUP, ROWS, LANES, TOP_K>(
        x, slots, scores, weight, scales, biases, out, partial,
        scales_shape[2] * GROUP, scales_shape[1], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)
_MATVEC = gpu.Call(
    "matvec",
    ("x", "slots", "weight", "scales", "biases"),
    """
    matvec<T, BITS, GROUP, ROWS, LANES>(
        x, slots, weight, scales, biases, out,
        scales_shape[2] * GROUP, scales_shape[1], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)
_LINEAR = gpu.Call(
    "linear",
    ("x", "weight", "scales", "biases"),
    """
    linear<T, BITS, GROUP, ROWS, LANES>(
        x, weight, scales, biases, out,
        scales_shape[1] * GROUP, scales_shape[0], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    uses=("quantized", "matvec"),
)


def _launch(
    call: gpu.Call,
    inputs: list[mx.array],
    shape: tuple[int, ...],
    *,
    vectors: int,
    simdgroups: int,
    tile: int,
    template: dict[str, Any],
) -> mx.array:
    """Run a kernel in threadgroups of ``simdgroups``, each of which makes ``tile`` elements of one of the vectors."""
    threadgroups = ((shape[-1] + tile - 1) // tile, vectors)
    (out,) = gpu.run(call, inputs, [shape], threadgroups=threadgroups, simdgroups=simdgroups, template=template)
    return out
