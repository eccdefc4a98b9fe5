"""mlx-lm's layers computed by the native CPU kernels, swapped in by class. No weight is copied."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from flashmoe_mlx.layers.gated_delta_layout import layout_of
from flashmoe_mlx.layers.projections import matrix_of
from flashmoe_mlx.ops import native
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.products import linear, matvec

_linear = linear.on(Backend.NATIVE)
_matvec = matvec.on(Backend.NATIVE)


class Linear(nn.QuantizedLinear):
    """``nn.QuantizedLinear`` with the native kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., output_dims]`` for ``[..., input_dims]``."""
        y = _linear(x, matrix_of(self))
        return y + self.bias if "bias" in self else y


class Embedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` in one kernel; as an output head it is a native product."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return rows ``[..., dims]`` of token numbers ``[...]``, float32."""
        return native.require().embed(x.astype(mx.uint32), *matrix_of(self))

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits ``[..., num_embeddings]`` for ``[..., dims]``."""
        return _linear(x, matrix_of(self))


class SwitchLinear(QuantizedSwitchLinear):
    """mlx-lm's ``QuantizedSwitchLinear`` with the native kernel."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return ``[..., 1, output_dims]`` for ``[..., 1, input_dims]``, broadcast to one for each of ``indices``."""
        slots = indices.reshape(1, -1)
        vectors = mx.broadcast_to(x.squeeze(-2), (*indices.shape, x.shape[-1]))
        y = _matvec(vectors.reshape(1, -1, x.shape[-1]), slots, matrix_of(self)).reshape(*indices.shape, 1, -1)
        return y + self.bias[indices][..., None, :] if "bias" in self else y


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in one kernel, where MLX runs ten operations on a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the norm of ``[..., dims]``."""
        if x.dtype != mx.float32:
            reference: mx.array = super().__call__(x)
            return reference
        return native.require().rms_norm(x, self.weight, self.eps)


class GatedDeltaNet(qwen3_5.GatedDeltaNet):
    """mlx-lm's ``GatedDeltaNet`` with one kernel between its projections."""

    def __call__(self, inputs: mx.array, mask: mx.array | None = None, cache: Any | None = None) -> mx.array:
        """Return ``[batch, tokens, hidden]`` for the same shape, updating mlx-lm's cache."""
        plain = mask is None and (cache is None or cache.lengths is None) and self.sharding_group is None
        if not plain or inputs.dtype != mx.float32 or inputs.size == 0:
            reference: mx.array = super().__call__(inputs, mask, cache)
            return reference
        batch, tokens, _ = inputs.shape
        window = state = None
        if cache is not None:
            window, state = cache[0], cache[1]
        if window is None:
            window = mx.zeros((batch, self.conv_kernel_size - 1, self.conv_dim))
        if state is None:
            state = mx.zeros((batch, self.num_v_heads, self.head_v_dim, self.head_k_dim))
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        y, window, state = native.require().gated_delta(
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
        output: mx.array = self.out_proj(y)
        return output


class Attention(qwen3_next.Qwen3NextAttention):
    """mlx-lm's gated attention with a kernel, where MLX's float products run scalar code on one thread."""

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """Return ``[batch, tokens, hidden]`` for the same shape, updating mlx-lm's cache."""
        plain = (mask is None or isinstance(mask, str)) and not hasattr(cache, "bits")
        if not plain or x.dtype != mx.float32 or x.size == 0:
            reference: mx.array = super().__call__(x, mask, cache)
            return reference
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
        attended = native.require().attention(queries, keys, values, self.scale, mask is not None)
        y: mx.array = self.o_proj((attended * mx.sigmoid(gates)).flatten(-2))
        return y


WIDENING = {nn.QuantizedLinear: Linear, nn.QuantizedEmbedding: Embedding, QuantizedSwitchLinear: SwitchLinear}
"""Quantized layers by mlx-lm's class. The native kernels widen their scales and biases, which stay as stored."""


def use_native_kernels(model: nn.Module) -> None:
    """Let the layers of a model compute in float32 with the native kernels."""
    for _, module in model.named_modules():
        kind = type(module)
        # The class is swapped, because a wrapper would rename the parameters.
        if kind in WIDENING and module.mode == "affine":
            module.__class__ = WIDENING[kind]
        elif kind is nn.RMSNorm:
            module.__class__ = RMSNorm
        elif kind is qwen3_5.GatedDeltaNet and module.head_k_dim % 16 == 0:
            module.__class__ = GatedDeltaNet
        elif kind is qwen3_next.Qwen3NextAttention and module.head_dim % 16 == 0:
            module.__class__ = Attention
