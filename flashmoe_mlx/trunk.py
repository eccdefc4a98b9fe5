"""The quantised layers of a model with the CPU's native kernels, in place of mlx-lm's own. No weight is copied."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from flashmoe_mlx import native, ops


class Linear(nn.QuantizedLinear):
    """``nn.QuantizedLinear``, computed by :func:`flashmoe_mlx.ops.linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., output_dims]`` of ``[..., input_dims]``."""
        y = ops.linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y + self.bias if "bias" in self else y


class Embedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding``, whose use as an output head is computed by :func:`flashmoe_mlx.ops.linear`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``[..., num_embeddings]`` of ``[..., dims]``."""
        return ops.linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)


class SwitchLinear(QuantizedSwitchLinear):
    """mlx-lm's ``QuantizedSwitchLinear``, computed by :func:`flashmoe_mlx.ops.matvec`."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """``[..., 1, output_dims]`` of ``x``, ``[..., 1, input_dims]``, broadcast to one for each of ``indices``."""
        slots = indices.reshape(1, -1)
        vectors = mx.broadcast_to(x.squeeze(-2), (*indices.shape, x.shape[-1]))
        matrix = ops.Quantized(self.weight, self.scales, self.biases, self.group_size, self.bits)
        y = ops.matvec(vectors.reshape(1, -1, x.shape[-1]), slots, matrix).reshape(*indices.shape, 1, -1)
        return y + self.bias[indices][..., None, :] if "bias" in self else y


_LAYERS = {nn.QuantizedLinear: Linear, nn.QuantizedEmbedding: Embedding, QuantizedSwitchLinear: SwitchLinear}


def use_native(model: nn.Module) -> None:
    """Let the affinely quantised layers of ``model`` use the native kernels. Where there are none, nothing happens."""
    if mx.default_device().type != mx.cpu or native.kernels() is None:
        return
    for _, module in model.named_modules():
        layer = _LAYERS.get(type(module))
        if layer is not None and module.mode == "affine":
            module.__class__ = layer  # a wrapper would give its parameters other names
