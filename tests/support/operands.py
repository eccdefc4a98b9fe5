"""Random operands of kernels, and their values in float64."""

import mlx.core as mx
import numpy as np

from flashmoe_mlx.ops.matrices import Quantized

BITS = (2, 3, 4, 5, 6, 8)


def normal(key: int, *shape: int) -> mx.array:
    """Return normally distributed values."""
    return mx.random.normal(shape, key=mx.random.key(key))


def quantized(slots: int, rows: int, columns: int, group_size: int, bits: int, dtype: mx.Dtype, key: int) -> Quantized:
    """Return random matrices ``[slots, rows, columns]``."""
    weight = normal(key, slots, rows, columns) * columns**-0.5
    parts = mx.quantize(weight, group_size, bits, stream=mx.cpu)
    return Quantized(parts[0], parts[1].astype(dtype), parts[2].astype(dtype), group_size, bits)


def one(matrix: Quantized, slot: int) -> Quantized:
    """Return one matrix of a stack, ``[rows, columns]``."""
    return Quantized(matrix.weight[slot], matrix.scales[slot], matrix.biases[slot], *matrix.format)


def widened(matrix: Quantized) -> Quantized:
    """Return the same matrices with scales in float32, in which MLX's operations are exact."""
    return matrix._replace(scales=matrix.scales.astype(mx.float32), biases=matrix.biases.astype(mx.float32))


def float64(array: mx.array) -> np.ndarray:
    """Return the values of an array."""
    return np.array(array.astype(mx.float32), np.float64)


def dequantized(matrix: Quantized) -> np.ndarray:
    """Return ``[slots, rows, columns]`` in float64; the bits of a row are one stream, lowest first."""
    stream = np.unpackbits(np.array(matrix.weight).view(np.uint8), axis=-1, bitorder="little")
    q = stream.reshape(*matrix.weight.shape[:2], -1, matrix.bits) @ (1 << np.arange(matrix.bits))
    scales, biases = (np.repeat(float64(part), matrix.group_size, -1) for part in matrix[1:3])
    return scales * q + biases


def float64_swiglu(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> np.ndarray:
    """Return SwiGLU activations ``[tokens, top_k, rows]`` of ``x``, ``[tokens, columns]``, in float64."""
    gated, upped = (
        np.einsum("tkrc,tc->tkr", dequantized(matrix)[np.array(slots)], float64(x)) for matrix in (gate, up)
    )
    return np.asarray(gated / (1 + np.exp(-gated)) * upped)


def float64_matvec(x: mx.array, slots: mx.array, matrix: Quantized) -> np.ndarray:
    """Return products ``[tokens, top_k, rows]`` of ``x``, ``[tokens, top_k, columns]``, in float64."""
    return np.asarray(np.einsum("tkrc,tkc->tkr", dequantized(matrix)[np.array(slots)], float64(x)))


def error(actual: mx.array, wanted: mx.array | np.ndarray) -> float:
    """Return the error relative to the norm of all wanted values."""
    assert actual.shape == wanted.shape
    exact = float64(wanted) if isinstance(wanted, mx.array) else wanted
    return float(np.linalg.norm(float64(actual) - exact) / np.linalg.norm(exact))
