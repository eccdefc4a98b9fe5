"""The dtype that each parameter is computed in."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe_mlx.layers.native_cpu import WIDENING, use_native_kernels
from flashmoe_mlx.ops.dispatch import Backend


def computed_dtype(stored: mx.Dtype, name: str, backend: Backend) -> mx.Dtype:
    """Return the dtype that an expert's parameter is computed in.

    MLX's CPU kernels accumulate in the dtype of the activations, so half precision is inaccurate there, and ten times
    slower: on a CPU it becomes float32. The native kernels widen scales and biases themselves.

    Args:
        stored (mx.Dtype): The checkpoint's.
        name (str): Of the parameter, such as ``gate_proj.scales``.
        backend (Backend): The model's.
    """
    if mx.default_device().type != mx.cpu or stored not in (mx.float16, mx.bfloat16):
        return stored
    if backend is Backend.NATIVE and name.endswith((".scales", ".biases")):
        return stored
    return mx.float32


def compute_in_float32(model: nn.Module, backend: Backend) -> None:
    """Let a model compute in float32, as on a CPU; native kernels keep scales and biases as stored."""
    if backend is Backend.NATIVE:
        use_native_kernels(model)

    def is_widened(module: nn.Module, name: str, value: Any) -> bool:
        kept = type(module) in WIDENING.values() and name in ("scales", "biases")
        return not kept and nn.Module.valid_parameter_filter(module, name, value)

    def widen(value: mx.array) -> mx.array:
        return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value

    model.apply(widen, is_widened)


def itemsize(model: nn.Module) -> int:
    """Return the bytes of an activation: float32's on a CPU, elsewhere those of the largest floating parameter."""
    if mx.default_device().type == mx.cpu:
        return mx.float32.size
    floats = [array for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return int(max(floats, key=lambda array: array.size).itemsize)
