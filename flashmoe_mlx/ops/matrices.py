"""Matrices in MLX's affine quantization."""

from typing import NamedTuple

import mlx.core as mx


class Quantized(NamedTuple):
    """Matrices in MLX's affine quantisation: ``weight = scale * q + bias``, for each group of a row's elements.

    Args:
        weight (mx.array): ``[slots, rows, columns * bits / 32]``, uint32.
        scales (mx.array): ``[slots, rows, columns / group_size]``, of the activations' dtype; native ones take any.
        biases (mx.array): like ``scales``.
        group_size (int): 32, 64 or 128.
        bits (int): 2, 3, 4, 5, 6 or 8.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def rows(self) -> int:
        """Elements of a product."""
        return self.weight.shape[1]


class Dense(NamedTuple):
    """A single matrix of a dense layer; see :class:`Quantized`.

    Args:
        weight (mx.array): ``[rows, columns * bits / 32]``, uint32.
        scales (mx.array): ``[rows, columns / group_size]``.
        biases (mx.array): like ``scales``.
        group_size (int): 32, 64 or 128.
        bits (int): 2, 3, 4, 5, 6 or 8.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int
