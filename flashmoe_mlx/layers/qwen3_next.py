"""Fused decode steps for the decoder layers of Qwen3.5 and Qwen3-Next.

Besides reading weights, a decode step costs launches and the host's work for each of them. mlx-lm's layers launch 36 to
44 kernels; these launch 8 or 12: projections that share an input are one matmul, everything between matmuls is one
kernel, and a layer ends with the norm that the next one begins with.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.layers.fused_decoder import FusedStep, NormHandoff, RouterOutputs, WeightIdentity, fuse
from flashmoe_mlx.layers.gated_delta_layout import layout_of
from flashmoe_mlx.layers.projections import matrix_of, merge_rows, share_dtype, share_format
from flashmoe_mlx.ops.attention import Heads, decode_attention, norm_rope
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.gated_delta import GatedDelta, gated_delta
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.norm import Norm, add_norm, combine
from flashmoe_mlx.ops.products import linear
from flashmoe_mlx.ops.routing import route, router_and_shared

PROJECTIONS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    qwen3_5.GatedDeltaNet: (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), "out_proj"),
    qwen3_next.Qwen3NextGatedDeltaNet: (("in_proj_qkvz", "in_proj_ba"), "out_proj"),
    qwen3_next.Qwen3NextAttention: (("q_proj", "k_proj", "v_proj"), "o_proj"),
}
"""Names of a mixer's linear layers: those that read its input, and the one that computes its output."""

_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer)
_ROUTER = ("gate", "shared_expert_gate")
_SWIGLU = ("gate_proj", "up_proj", "down_proj")

# From the layer's input and its norm, [1, tokens, hidden], and its cache to RouterOutputs.
Mixer = Callable[[mx.array, mx.array, Any], Sequence[mx.array]]


class _Block(NamedTuple):
    """A layer after its mixer. The shared expert's gate is the last row of the router."""

    norm: Norm
    router: Quantized
    top_k: int
    normalize: bool
    gate: Quantized
    up: Quantized
    down: Quantized


def fuse_decoder_layers(model: nn.Module, backend: Backend) -> int:
    """Give each decoder layer of a model a fused decode step.

    The layers stay the same objects in the same places, and so do their parameters: those of projections that share an
    input become views of one array. A layer of another family, with another quantization than affine, or with adapters
    stays as it was.

    Args:
        model (nn.Module): mlx-lm's, with evaluated parameters.
        backend (Backend): The model's.

    Returns:
        int: Number of layers fused.
    """
    following: FusedStep | None = None
    count = 0
    # The last layer comes first.
    for _, layer in model.named_modules():
        if type(layer) in _LAYERS and (step := _build_step(layer, following, backend)):
            fuse(layer, step)
            following = step
            count += 1
    return count


def _build_step(layer: nn.Module, following: FusedStep | None, backend: Backend) -> FusedStep | None:
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
    if not (share_format(inputs) and share_format(router) and all(share_format([each]) for each in (output, *swiglu))):
        return None
    if not share_dtype(backend, floats, inputs, [output], router, *[[each] for each in swiglu]):
        return None
    if not layer.is_linear and (type(mixer.rope) is not nn.RoPE or mixer.rope.traditional):
        return None

    gate, up, down = map(matrix_of, swiglu)
    weights = _Block(
        _norm_of(layer.post_attention_layernorm),
        merge_rows(router),
        block.top_k,
        bool(block.norm_topk_prob),
        gate,
        up,
        down,
    )
    finish = _router_step(weights, backend)
    build = _gated_delta_mixer if layer.is_linear else _attention_mixer
    norm, norm_in = _norm_of(layer.input_layernorm), NormHandoff()
    return FusedStep(
        mix=build(mixer, inputs, output, finish, backend),
        # After the last layer nothing takes the norm, so any serves.
        end=_layer_end(following.norm if following else norm, backend),
        weights=WeightIdentity(floats[0].dtype, (mixer, (*names, output_name)), (block, _ROUTER), (shared, _SWIGLU)),
        norm=norm,
        norm_in=norm_in,
        norm_out=following.norm_in if following else norm_in,
    )


def _gated_delta_mixer(
    mixer: nn.Module,
    inputs: list[nn.Module],
    output: nn.Module,
    finish: Callable[[mx.array, mx.array], RouterOutputs],
    backend: Backend,
) -> Mixer:
    project, mix_tokens = linear.on(backend), gated_delta.on(backend)
    merged, out = merge_rows(inputs), matrix_of(output)
    layer = GatedDelta(mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, _norm_of(mixer.norm), layout_of(mixer))

    def step(x: mx.array, normed: mx.array, window: mx.array, state: mx.array) -> tuple[mx.array, ...]:
        y, window, state = mix_tokens(project(normed, merged), window, state, layer)
        return *finish(x, project(y, out)), window, state

    fused = Fused(step, backend)

    def mix(x: mx.array, normed: mx.array, cache: ArraysCache) -> Sequence[mx.array]:
        *routed, cache[0], cache[1] = fused(x, normed, cache[0], cache[1])
        cache.advance(x.shape[1])
        return routed

    return mix


def _attention_mixer(
    mixer: nn.Module,
    inputs: list[nn.Module],
    output: nn.Module,
    finish: Callable[[mx.array, mx.array], RouterOutputs],
    backend: Backend,
) -> Mixer:
    project, rotate, attend = linear.on(backend), norm_rope.on(backend), decode_attention.on(backend)
    merged, out, scale = merge_rows(inputs), matrix_of(output), mixer.scale
    heads = Heads(
        query=mixer.num_attention_heads,
        key=mixer.num_key_value_heads,
        q_norm=mixer.q_norm.weight,
        k_norm=mixer.k_norm.weight,
        eps=mixer.q_norm.eps,
        dims=mixer.rope.dims,
        base=float(mixer.rope.base),
        scale=float(mixer.rope.scale),
    )

    def split(normed: mx.array, position: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        projected = project(normed, merged)
        queries, keys, values = rotate(projected, position, heads)
        return queries, keys, values, projected

    def attended(
        keys: mx.array, values: mx.array, queries: mx.array, projected: mx.array, position: mx.array, x: mx.array
    ) -> RouterOutputs:
        return finish(x, project(attend(queries, keys, values, position, projected, scale), out))

    split_heads = Fused(split, backend)

    # The cache grows in steps. One function per capacity, so that graphs compiled for old ones are dropped.
    @lru_cache(maxsize=8)
    def attend_within(capacity: int) -> Fused:
        return Fused(attended, backend)

    def mix(x: mx.array, normed: mx.array, cache: KVCache) -> Sequence[mx.array]:
        position = _position(cache.offset)
        queries, keys, values, projected = split_heads(normed, position)
        _append(cache, keys, values)
        return attend_within(cache.keys.shape[2])(cache.keys, cache.values, queries, projected, position, x)

    return mix


def _router_step(block: _Block, backend: Backend) -> Callable[[mx.array, mx.array], RouterOutputs]:
    """Return what follows the mixer: from the layer's input and the mixer's output to :data:`RouterOutputs`."""
    add, ask, choose, project = (
        add_norm.on(backend),
        router_and_shared.on(backend),
        route.on(backend),
        linear.on(backend),
    )

    def finish(x: mx.array, y: mx.array) -> RouterOutputs:
        residual, experts_input = add(x, y, block.norm)
        logits, hidden = ask(experts_input, block.router, block.gate, block.up)
        experts, scores = choose(logits, block.top_k, block.normalize)
        return residual, experts_input, experts, scores, project(hidden, block.down)

    return finish


def _layer_end(norm: Norm, backend: Backend) -> Callable[[mx.array, mx.array, mx.array, mx.array], Sequence[mx.array]]:
    merge = combine.on(backend)

    @mx.compile
    def end(residual: mx.array, routed: mx.array, scores: mx.array, shared: mx.array) -> tuple[mx.array, mx.array]:
        return merge(residual, routed, scores, shared, norm)

    return end


def _append(cache: KVCache, keys: mx.array, values: mx.array) -> None:
    """Append to a cache like ``update_and_fetch``, without building the views that it returns."""
    begin, end = cache.offset, cache.offset + keys.shape[2]
    if cache.keys is None or end > cache.keys.shape[2]:
        cache.update_and_fetch(keys, values)
        return
    cache.keys[:, :, begin:end] = keys
    cache.values[:, :, begin:end] = values
    cache.offset = end


@lru_cache(maxsize=1)
def _position(offset: int) -> mx.array:
    """Return a token's position as an array, built once for all layers."""
    return mx.array([offset])


def _norm_of(module: nn.Module) -> Norm:
    return Norm(module.weight, module.eps)


def _own_floats(mixer: nn.Module) -> list[mx.array]:
    """Return a mixer's unquantized parameters that kernels read in the dtype of activations."""
    if isinstance(mixer, qwen3_next.Qwen3NextAttention):
        return [mixer.q_norm.weight, mixer.k_norm.weight]
    return [mixer.conv1d.weight]
