"""Matrices in MLX's affine quantization."""

from typing import NamedTuple

import mlx.core as mx


class Quantized(NamedTuple):
    """One matrix, or a stack of them: ``weight = scale * q + bias`` for each group of a row's elements.

    Args:
        weight (mx.array): ``[..., rows, columns * bits / 32]``, uint32.
        scales (mx.array): ``[..., rows, columns / group_size]``. GPU kernels need the dtype of the activations; native
            kernels take float32, float16 and bfloat16.
        biases (mx.array): Shape and dtype of ``scales``.
        group_size (int): 32, 64 or 128 elements.
        bits (int): 2, 3, 4, 5, 6 or 8 per element.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def rows(self) -> int:
        """Rows of a matrix, which is the size of a product."""
        return self.weight.shape[-2]

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Weight, scales and biases, as kernels take them."""
        return self.weight, self.scales, self.biases

    @property
    def format(self) -> tuple[int, int]:
        """Group size and bits."""
        return self.group_size, self.bits
