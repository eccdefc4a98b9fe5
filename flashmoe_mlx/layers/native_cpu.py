"""The layers of a model with the native CPU kernels, in place of mlx-lm's own. No weight is copied."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from flashmoe_mlx.layers.gated_delta_layout import layout_of
from flashmoe_mlx.ops import native
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.matrices import Quantized


class Linear(nn.QuantizedLinear):
    """``nn.QuantizedLinear``, computed by :func:`flashmoe_mlx.ops.products.linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., output_dims]`` of ``[..., input_dims]``."""
        y = ops.linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y + self.bias if "bias" in self else y


class Embedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` in one kernel, and as an output head :func:`flashmoe_mlx.ops.products.linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Rows ``[..., dims]`` of token numbers ``[...]``, in float32."""
        if kernels := native.kernels():
            numbers = x.astype(mx.uint32)
            return kernels.embed(numbers, self.weight, self.scales, self.biases, self.group_size, self.bits)
        scales, biases = self.scales[x].astype(mx.float32), self.biases[x].astype(mx.float32)
        return mx.dequantize(self.weight[x], scales, biases, self.group_size, self.bits)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``[..., num_embeddings]`` of ``[..., dims]``."""
        return ops.linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)


class SwitchLinear(QuantizedSwitchLinear):
    """mlx-lm's ``QuantizedSwitchLinear``, computed by :func:`flashmoe_mlx.ops.products.matvec`."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """``[..., 1, output_dims]`` of ``x``, ``[..., 1, input_dims]``, broadcast to one for each of ``indices``."""
        slots = indices.reshape(1, -1)
        vectors = mx.broadcast_to(x.squeeze(-2), (*indices.shape, x.shape[-1]))
        matrix = Quantized(self.weight, self.scales, self.biases, self.group_size, self.bits)
        y = ops.matvec(vectors.reshape(1, -1, x.shape[-1]), slots, matrix).reshape(*indices.shape, 1, -1)
        return y + self.bias[indices][..., None, :] if "bias" in self else y


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in one kernel, where MLX makes ten operations of it on a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., dims]`` of the same."""
        kernels = native.kernels()
        if kernels is None or x.dtype != mx.float32:
            theirs: mx.array = super().__call__(x)
            return theirs
        return kernels.rms_norm(x, self.weight, self.eps)


class GatedDeltaNet(qwen3_5.GatedDeltaNet):
    """mlx-lm's ``GatedDeltaNet``, one kernel between its projections."""

    def __call__(self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None) -> mx.array:
        """``[batch, tokens, hidden]`` of the same, after what the cache remembers."""
        kernels = native.kernels()
        plain = mask is None and (cache is None or cache.lengths is None) and self.sharding_group is None
        if kernels is None or not plain or inputs.dtype != mx.float32 or inputs.size == 0:
            theirs: mx.array = super().__call__(inputs, mask, cache)
            return theirs
        batch, tokens, _ = inputs.shape
        window = state = None
        if cache is not None:
            window, state = cache[0], cache[1]
        if window is None:
            window = mx.zeros((batch, self.conv_kernel_size - 1, self.conv_dim))
        if state is None:
            state = mx.zeros((batch, self.num_v_heads, self.head_v_dim, self.head_k_dim))
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        y: mx.array
        y, window, state = kernels.delta_net(
            mx.concatenate([project(inputs) for project in projections], axis=-1),
            window.astype(mx.float32),
            state.astype(mx.float32),
            self.conv1d.weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            layout_of(self),
            self.norm.eps,
        )
        if cache is not None:
            cache[0], cache[1] = window, state
            cache.advance(tokens)
        y = self.out_proj(y)
        return y


class Attention(qwen3_next.Qwen3NextAttention):
    """mlx-lm's gated attention with a kernel, where MLX's products of floats have one thread and scalar code."""

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """``[batch, tokens, hidden]`` of the same, after what the cache remembers."""
        kernels = native.kernels()
        plain = (mask is None or isinstance(mask, str)) and not hasattr(cache, "bits")
        if kernels is None or not plain or x.dtype != mx.float32 or x.size == 0:
            theirs: mx.array = super().__call__(x, mask, cache)
            return theirs
        batch, tokens, _ = x.shape
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        queries, gates = mx.split(self.q_proj(x).reshape(batch, tokens, heads, -1), 2, axis=-1)
        queries = self.q_norm(queries).swapaxes(1, 2)
        keys = self.k_norm(self.k_proj(x).reshape(batch, tokens, key_heads, -1)).swapaxes(1, 2)
        values = self.v_proj(x).reshape(batch, tokens, key_heads, -1).swapaxes(1, 2)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = (each.astype(mx.float32) for each in cache.update_and_fetch(keys, values))
        attended = kernels.attention(queries, keys, values, self.scale, mask is not None)
        y: mx.array = self.o_proj((attended * mx.sigmoid(gates)).flatten(-2))
        return y


_QUANTIZED = {nn.QuantizedLinear: Linear, nn.QuantizedEmbedding: Embedding, QuantizedSwitchLinear: SwitchLinear}


def use_native(model: nn.Module) -> None:
    """Let the layers of ``model`` compute in float32 with the native kernels. Where there are none, nothing happens."""
    if mx.default_device().type != mx.cpu or native.kernels() is None:
        return
    for _, module in model.named_modules():
        kind = type(module)
        if kind in _QUANTIZED and module.mode == "affine":
            module.__class__ = _QUANTIZED[kind]  # a wrapper would give its parameters other names
        elif kind is nn.RMSNorm:
            module.__class__ = RMSNorm
        elif kind is qwen3_5.GatedDeltaNet and module.head_k_dim % 16 == 0:
            module.__class__ = GatedDeltaNet
        elif kind is qwen3_next.Qwen3NextAttention and module.head_dim % 16 == 0:
            module.__class__ = Attention
