"""Which dtype each parameter is computed in."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe_mlx.layers.native_cpu import _QUANTIZED


def to_float32(model: nn.Module) -> None:
    """Turn parameters to float32, but for scales that the native kernels widen themselves."""

    def wide(module: nn.Module, name: str, value: Any) -> bool:
        kept = type(module) in _QUANTIZED.values() and name in ("scales", "biases")
        return not kept and nn.Module.valid_parameter_filter(module, name, value)

    def widen(value: mx.array) -> mx.array:
        return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value

    model.apply(widen, wide)


def _itemsize(module: nn.Module) -> int:
    """Bytes of a value as it is computed: on a CPU float32's, elsewhere those of the largest parameter of floats."""
    if mx.default_device().type == mx.cpu:
        return mx.float32.size
    floats = [array for _, array in tree_flatten(module.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return int(max(floats, key=lambda array: array.size).itemsize)
