"""Decoder layers of Qwen3.5 and Qwen3-Next that decode in few launches.

What a step of few tokens costs is, next to reading weights, launches and the host's work for each of them. mlx-lm's
layers make 36 to 44; these make 8 or 12: projections of the same input are one product, what lies between products is
one kernel, and a layer ends with the norm that the next one begins with. The host's work is kept by ``mx.compile``.
All else, prompts above all, runs through mlx-lm's own code.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.layers.fused_decoder import (
    FewLaunches,
    Norm,
    Prepared,
    Routed,
    Snapshot,
    Way,
    _alike,
    _append,
    _end,
    _fit,
    _matrix,
    _merge,
    _norm,
    _position,
)
from flashmoe_mlx.layers.gated_delta_layout import layout_of
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.attention import Rope, attend, norm_rope
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.gated_delta import gated_delta
from flashmoe_mlx.ops.matrices import Dense
from flashmoe_mlx.ops.norm import add_norm
from flashmoe_mlx.ops.routing import ask, route


def swap_trunk(model: nn.Module) -> int:
    """Let the decoder layers of a model decode in few launches. They stay what they are, and where they are.

    Their parameters, too: those of projections that read the same input become parts of one array, layer after layer,
    so that nothing is held twice. A layer of another family, of another quantisation than the affine one, or with
    adapters stays as it was.

    Args:
        model (nn.Module): mlx-lm's, its parameters evaluated.

    Returns:
        int: how many layers it changed.
    """
    following: Way | None = None
    swapped = 0
    for _, layer in model.named_modules():  # the last one first
        if type(layer) in _LAYERS and (way := _swap(layer, following)):
            following = way
            swapped += 1
    return swapped


_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer)


def _swap(layer: nn.Module, following: Way | None) -> Way | None:
    block = layer.mlp
    if type(block) is not qwen3_next.Qwen3NextSparseMoeBlock or block.sharding_group is not None:
        return None
    mixer = layer.linear_attn if layer.is_linear else layer.self_attn
    shared = block.shared_expert
    names, output_name = next(names for kind, names in PROJECTIONS.items() if isinstance(mixer, kind))
    inputs, output = [mixer[name] for name in names], mixer[output_name]
    router = [block[name] for name in _ROUTER]
    swiglu = [shared[name] for name in _SWIGLU]
    floats = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *_own_floats(mixer)]
    if not (_alike(inputs) and _alike(router) and all(_alike([linear]) for linear in (output, *swiglu))):
        return None
    if not _fit(floats, inputs, [output], router, *[[linear] for linear in swiglu]):
        return None
    if not layer.is_linear and (type(mixer.rope) is not nn.RoPE or mixer.rope.traditional):
        return None

    block_weights = _Block(
        _norm(layer.post_attention_layernorm),
        _merge(router),
        block.top_k,
        bool(block.norm_topk_prob),
        *map(_matrix, swiglu),
    )
    make = _delta_net if layer.is_linear else _attention
    norm, normed = _norm(layer.input_layernorm), Prepared()
    way = Way(
        make(mixer, inputs, output, block_weights),
        _end(following.norm if following else norm),  # of what the last layer makes nothing comes
        Snapshot(floats[0].dtype, (mixer, (*names, output_name)), (block, _ROUTER), (shared, _SWIGLU)),
        norm,
        normed,
        following.normed if following else normed,
    )
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (FewLaunches, kind), {})  # a wrapper would give its parameters other names
    layer._way = way
    return way


# Of a mixer those that read its input, and the one that makes its output.
PROJECTIONS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    qwen3_5.GatedDeltaNet: (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), "out_proj"),
    qwen3_next.Qwen3NextGatedDeltaNet: (("in_proj_qkvz", "in_proj_ba"), "out_proj"),
    qwen3_next.Qwen3NextAttention: (("q_proj", "k_proj", "v_proj"), "o_proj"),
}
_ROUTER = ("gate", "shared_expert_gate")
_SWIGLU = ("gate_proj", "up_proj", "down_proj")


class _Block(NamedTuple):
    """What follows a layer's mixer. The shared expert's gate is the last row of the router."""

    norm: Norm
    router: Dense
    top_k: int
    normalize: bool
    gate: Dense
    up: Dense
    down: Dense


def _delta_net(
    mixer: nn.Module, inputs: list[nn.Module], output: nn.Module, block: _Block
) -> Callable[[mx.array, mx.array, Any], Sequence[mx.array]]:
    merged, layout, out = _merge(inputs), layout_of(mixer), _matrix(output)
    taps, a_log, dt_bias, norm = mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, _norm(mixer.norm)

    @Fused
    def step(x: mx.array, normed: mx.array, window: mx.array, state: mx.array) -> tuple[mx.array, ...]:
        projected = ops.linear(normed, *merged)
        y, window, state = gated_delta(
            projected, window, state, taps, a_log, dt_bias, norm.weight, layout=layout, eps=norm.eps
        )
        return *_route(x, ops.linear(y, *out), block), window, state

    def mix(x: mx.array, normed: mx.array, cache: ArraysCache) -> Sequence[mx.array]:
        *routed, cache[0], cache[1] = step(x, normed, cache[0], cache[1])
        cache.advance(x.shape[1])
        return routed

    return mix


def _attention(
    mixer: nn.Module, inputs: list[nn.Module], output: nn.Module, block: _Block
) -> Callable[[mx.array, mx.array, Any], Sequence[mx.array]]:
    merged, out, scale = _merge(inputs), _matrix(output), mixer.scale
    heads, key_heads = mixer.num_attention_heads, mixer.num_key_value_heads
    q_norm, k_norm = mixer.q_norm.weight, mixer.k_norm.weight
    rope = Rope(mixer.rope.dims, float(mixer.rope.base), float(mixer.rope.scale), mixer.q_norm.eps)

    @Fused
    def project(normed: mx.array, position: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Queries, keys, values ``[1, heads, tokens, head_dim]``, and all that is projected."""
        projected = ops.linear(normed, *merged)
        queries, keys, values = norm_rope(
            projected, q_norm, k_norm, position, heads=heads, key_heads=key_heads, rope=rope
        )
        return queries, keys, values, projected

    @lru_cache(maxsize=8)
    def behind(capacity: int) -> Fused:
        """All that follows a cache of so many positions. It grows, and one function would keep what MLX compiles for
        each size."""

        @Fused
        def attended(
            keys: mx.array, values: mx.array, queries: mx.array, projected: mx.array, position: mx.array, x: mx.array
        ) -> Routed:
            y = attend(queries, keys, values, position, projected, scale)
            return _route(x, ops.linear(y, *out), block)

        return attended

    def mix(x: mx.array, normed: mx.array, cache: KVCache) -> Sequence[mx.array]:
        position = _position(cache.offset)
        queries, keys, values, projected = project(normed, position)
        _append(cache, keys, values)
        attended = behind(cache.keys.shape[2])
        return attended(cache.keys, cache.values, queries, projected, position, x)

    return mix


def _route(x: mx.array, y: mx.array, block: _Block) -> Routed:
    residual, experts_input = add_norm(x, y, *block.norm)
    logits, hidden = ask(experts_input, block.router, block.gate, block.up)
    experts, scores = route(logits, block.top_k, block.normalize)
    return residual, experts_input, experts, scores, ops.linear(hidden, *block.down)


def _own_floats(mixer: nn.Module) -> list[mx.array]:
    """Parameters of a mixer that are not quantised and that kernels read with the dtype of activations."""
    if isinstance(mixer, qwen3_next.Qwen3NextAttention):
        return [mixer.q_norm.weight, mixer.k_norm.weight]
    return [mixer.conv1d.weight]
