"""Products of vectors and quantized matrices, dense or routed to experts.

GPU kernels are sources in ``kernels/``; its README explains their launches. They serve the few tokens of a decode step
and read slabs in place. Activations must begin at a multiple of 16 bytes: an array of its own does, a slice of another
may not. Native CPU kernels are in ``native/`` and serve any number of tokens.

Every kernel accumulates in float32 and rounds once. An output depends on its own token and expert only, not on what
else the call computes. A routed product whose slot is ``NO_SLOT`` is zero; the references do not support ``NO_SLOT``.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.dispatch import GPUS, Backend, Operation
from flashmoe_mlx.ops.matrices import Quantized

MAX_PAIRS = 128
"""Pairs of a token and an expert that GPU kernels serve. Larger products are matrix products, where MLX is faster."""


def gpu_serves(x: mx.array, slots: mx.array, *matrices: Quantized) -> bool:
    """Return whether the GPU's product kernels serve these operands.

    Args:
        x (mx.array): Activations of any shape.
        slots (mx.array): ``[..., top_k]``, one per product.
        matrices (Quantized): What they are multiplied with.
    """
    return 0 < slots.size <= MAX_PAIRS and _gpu_reads(x, *matrices)


def _gpu_reads(x: mx.array, *matrices: Quantized) -> bool:
    return all(matrix.scales.dtype == x.dtype and matrix.scales.size >= gpu.DEVICE_MEMORY for matrix in matrices)


def _native_serves(x: mx.array, slots: mx.array, *matrices: Quantized) -> bool:
    return x.dtype == mx.float32 and slots.size > 0


def _gate_up_on_gpu(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> bool:
    return gate.format == up.format and gpu_serves(x, slots, gate, up)


def _gate_up_native(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> bool:
    return gate.format == up.format and _native_serves(x, slots)


@Operation
def gate_up(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    """Compute hidden activations of SwiGLU experts, ``silu(gate[slot] x) * (up[slot] x)``, as mlx-lm's ``SwitchGLU``.

    Args:
        x (mx.array): ``[..., columns]``.
        slots (mx.array): Slots of each token's experts, ``[..., top_k]``, uint32.
        gate (Quantized): ``[slots, rows, columns]``.
        up (Quantized): Like ``gate``. Kernels need the same bits and group size.

    Returns:
        mx.array: ``[..., top_k, rows]``, dtype of ``x``.
    """
    x = x[..., None, :]
    hidden: mx.array = nn.silu(matvec.reference(x, slots, gate)) * matvec.reference(x, slots, up)
    return hidden


@gate_up.kernel(Backend.NATIVE, serves=_gate_up_native)
def _(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    return native.require().gate_up(x, slots.astype(mx.uint32), *gate.arrays, *up.arrays, *gate.format)


@gate_up.kernel(*GPUS, serves=_gate_up_on_gpu)
def _(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    rows = 2 if gate.bits == 2 else 1
    return _launch(
        _GATE_UP,
        [x, slots, *gate.arrays, *up.arrays],
        (*slots.shape, gate.rows),
        vectors=slots.size,
        simdgroups=2,
        tile=2 * rows,
        template={"BITS": gate.bits, "GROUP": gate.group_size, "ROWS": rows, "LANES": 32, "TOP_K": slots.shape[-1]},
    )


@Operation
def matvec(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    """Multiply vectors with routed matrices: ``matrix[slot] x`` for each slot and the vector in its place.

    Args:
        x (mx.array): ``[..., top_k, columns]``. The reference also broadcasts ``[..., 1, columns]``.
        slots (mx.array): ``[..., top_k]``, uint32.
        matrix (Quantized): ``[slots, rows, columns]``.

    Returns:
        mx.array: ``[..., top_k, rows]``, dtype of ``x``.
    """
    weight, scales, biases, group_size, bits = matrix
    return mx.gather_qmm(
        x[..., None, :], weight, scales, biases, rhs_indices=slots, transpose=True, group_size=group_size, bits=bits
    ).squeeze(-2)


@matvec.kernel(Backend.NATIVE, serves=_native_serves)
def _(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    return native.require().matvec(x, slots.astype(mx.uint32), *matrix)


@matvec.kernel(Backend.METAL, serves=gpu_serves)
def _(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    # Apple's GPUs have 128 registers. Two rows of 4 bits need 137; of 2 bits, where loads are small, 123 in half
    # precision.
    return _matvec(x, slots, matrix, rows=2 if matrix.bits == 2 and x.dtype != mx.float32 else 1)


@matvec.kernel(Backend.CUDA, serves=gpu_serves)
def _(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    return _matvec(x, slots, matrix, rows=2)


def _matvec(x: mx.array, slots: mx.array, matrix: Quantized, rows: int) -> mx.array:
    return _launch(
        _MATVEC,
        [x, slots, *matrix.arrays],
        (*slots.shape, matrix.rows),
        vectors=slots.size,
        simdgroups=4,
        tile=8 * rows,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": rows, "LANES": 16},
    )


def _one_large_vector(x: mx.array, matrix: Quantized) -> bool:
    return x.size == x.shape[-1] and _gpu_reads(x, matrix)


@Operation
def linear(x: mx.array, matrix: Quantized) -> mx.array:
    """Multiply vectors with one matrix, as a dense layer does.

    The native kernel computes each vector by itself. CUDA has a kernel for a single vector, where MLX's own product
    reaches half the bandwidth.

    Args:
        x (mx.array): ``[..., columns]``.
        matrix (Quantized): ``[rows, columns]``.

    Returns:
        mx.array: ``[..., rows]``, dtype of ``x``.
    """
    weight, scales, biases, group_size, bits = matrix
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


@linear.kernel(Backend.NATIVE, serves=lambda x, matrix: x.dtype == mx.float32)
def _(x: mx.array, matrix: Quantized) -> mx.array:
    return native.require().linear(x, *matrix)


@linear.kernel(Backend.CUDA, serves=_one_large_vector)
def _(x: mx.array, matrix: Quantized) -> mx.array:
    return _launch(
        _LINEAR,
        [x, *matrix.arrays],
        (*x.shape[:-1], matrix.rows),
        vectors=1,
        simdgroups=2,
        tile=4,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": 2, "LANES": 32},
    )


def swiglu_experts(gate: Quantized, up: Quantized, down: Quantized, backend: Backend) -> Callable[..., mx.array]:
    """Return a function that computes SwiGLU experts on a backend, one output each, like mlx-lm's ``SwitchGLU``.

    Args:
        gate (Quantized): ``[slots, intermediate, hidden]``.
        up (Quantized): Like ``gate``.
        down (Quantized): ``[slots, hidden, intermediate]``.
        backend (Backend): The model's.

    Returns:
        Callable: Takes ``x``, ``[..., hidden]``, and ``slots``, ``[..., top_k]``, uint32; returns
        ``[..., top_k, hidden]``, dtype of ``x``.
    """
    hidden, output = gate_up.on(backend), matvec.on(backend)
    return lambda x, slots: output(hidden(x, slots, gate, up), slots, down)


_GATE_UP = gpu.Kernel(
    "gate_up",
    ("x", "slots", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
    """
    gate_up<T, BITS, GROUP, ROWS, LANES, TOP_K>(
        x, slots, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases, out,
        gate_scales_shape[2] * GROUP, gate_scales_shape[1], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)
_MATVEC = gpu.Kernel(
    "matvec",
    ("x", "slots", "weight", "scales", "biases"),
    """
    matvec<T, BITS, GROUP, ROWS, LANES>(
        x, slots, weight, scales, biases, out,
        scales_shape[2] * GROUP, scales_shape[1], threadgroup_position_in_grid.y,
        threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)
_LINEAR = gpu.Kernel(
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
    kernel: gpu.Kernel,
    inputs: list[mx.array],
    shape: tuple[int, ...],
    *,
    vectors: int,
    simdgroups: int,
    tile: int,
    template: dict[str, Any],
) -> mx.array:
    """Run a kernel in threadgroups of ``simdgroups``, each of which computes ``tile`` elements of one vector."""
    threadgroups = ((shape[-1] + tile - 1) // tile, vectors)
    (out,) = gpu.run(kernel, inputs, [shape], threadgroups=threadgroups, simdgroups=simdgroups, template=template)
    return out
