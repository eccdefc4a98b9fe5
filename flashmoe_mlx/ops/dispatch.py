"""Which implementation of an operation runs."""

import mlx.core as mx

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.matrices import Dense, Quantized

FEW_TOKENS = 8  # of a call that decodes; in a longer one the device has enough to do


def few_tokens(x: mx.array) -> bool:
    """Whether ``x``, ``[..., width]``, is of a call that decodes."""
    return x.size <= FEW_TOKENS * x.shape[-1]


MAX_PAIRS = 128  # of a token and an expert; a product of more is a matrix product, and MLX's own are better at that

MAX_TOP_K = 16  # experts of a token, for down()


def has_kernel(x: mx.array, slots: mx.array, *matrices: Quantized | Dense) -> bool:
    """The dispatch rule: whether the kernels run, on this device and for these operands. Otherwise the twins do.

    Args:
        x (mx.array): activations, whatever their shape.
        slots (mx.array): ``[..., top_k]``, one for each product.
        matrices (Quantized or Dense): what they are multiplied with.
    """
    if not gpu.on_gpu():
        return x.dtype == mx.float32 and slots.size > 0 and native.kernels() is not None
    return (
        0 < slots.size <= MAX_PAIRS
        and slots.shape[-1] <= MAX_TOP_K
        and all(matrix.scales.dtype == x.dtype and matrix.scales.size >= gpu.DEVICE_MEMORY for matrix in matrices)
    )


def native_kernels(x: mx.array) -> native.Kernels | None:
    """The native kernels, if they take ``x``."""
    return native.kernels() if x.dtype == mx.float32 and not gpu.on_gpu() else None
