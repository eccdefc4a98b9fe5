"""Linear layers of a trunk as the matrices that operations take."""

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.system.huge_pages import use_huge_pages


def matrix_of(linear: nn.Module) -> Quantized:
    """Return the matrix of a quantized layer, ``[rows, columns]``, or the stack of a switch layer's."""
    return Quantized(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits)


def merge_rows(linears: list[nn.Module]) -> Quantized:
    """Stack the rows of layers that read the same input into one matrix, ``[all rows, columns]``.

    The layers' own parameters become views of it, so nothing is held twice.
    """
    rows = [linear.weight.shape[0] for linear in linears]
    ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    merged = {}
    for name in ("weight", "scales", "biases"):
        merged[name] = mx.concatenate([linear[name] for linear in linears])
        # Row ranges of a contiguous array share its memory.
        parts = mx.split(merged[name], ends)
        mx.eval(parts, merged[name])
        use_huge_pages(merged[name])
        for linear, part in zip(linears, parts, strict=True):
            linear[name] = part
    return Quantized(**merged, group_size=linears[0].group_size, bits=linears[0].bits)


def share_format(linears: list[nn.Module]) -> bool:
    """Return whether all are affine ``nn.QuantizedLinear`` without bias, of the same bits and group size."""
    if any(not isinstance(each, nn.QuantizedLinear) or each.mode != "affine" or "bias" in each for each in linears):
        return False
    return len({(linear.group_size, linear.bits) for linear in linears}) == 1


def share_dtype(backend: Backend, floats: list[mx.array], *groups: list[nn.Module]) -> bool:
    """Return whether kernels of a backend can read these parameters together.

    Args:
        backend (Backend): Native kernels widen scales themselves, so there each group needs one dtype of its own.
        floats (list[mx.array]): Parameters that are not quantized.
        groups (list[nn.Module]): Linear layers; each group becomes one matrix.
    """
    dtypes = {array.dtype for array in floats}
    of_groups = [{part.dtype for linear in linears for part in (linear.scales, linear.biases)} for linears in groups]
    if backend is Backend.NATIVE and dtypes == {mx.float32}:
        return all(len(each) == 1 for each in of_groups)
    return len(dtypes.union(*of_groups)) == 1
