"""Decoder layers of Qwen3.5 and Qwen3-Next that decode in few launches.

What a step of few tokens costs is, next to reading weights, launches and the host's work for each of them. mlx-lm's
layers make some 80; these make a dozen: projections of the same input are one product, and what lies between products
is one kernel. The host's work is kept by ``mx.compile``. All else, prompts above all, runs through mlx-lm's own code.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx import ops
from flashmoe_mlx.early import FEW_TOKENS
from flashmoe_mlx.ops import Layout, Quantized, Rope

# What a layer makes until its experts are known: the residual [tokens, hidden], the experts' input [1, tokens, hidden],
# expert numbers [1, tokens, top_k], and scores [tokens, top_k + 1].
Routed = tuple[mx.array, mx.array, mx.array, mx.array]


class Snapshot:
    """The linear layers that another way was made of, so that it is not taken once they were changed.

    Args:
        parents (tuple): modules, each with the names of those of its children that count.
    """

    def __init__(self, *parents: tuple[nn.Module, Iterable[str]]):
        children = [(parent, name, parent[name]) for parent, names in parents for name in names]
        self.dtype: mx.Dtype = children[0][2].scales.dtype
        self._found = [*children, *((linear, "scales", linear.scales) for _, _, linear in children)]

    def holds(self) -> bool:
        """Whether they still are what they were: without adapters, in the same dtype, with the same weights."""
        for module, name, value in self._found:  # noqa: SIM110 - this runs for every layer of every token
            if module.get(name) is not value:
                return False
        return True


class FewLaunches(nn.Module):
    """What :func:`swap_trunk` adds to a decoder layer: another way to compute a step of few tokens."""

    _mix: Callable[[mx.array, Any], Routed]
    _made_of: Snapshot

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """The layer's output ``[batch, tokens, hidden]``, with mlx-lm's caches."""
        if not self._decodes(x, mask, cache):
            y: mx.array = super().__call__(x, mask, cache)
            return y
        residual, experts_input, experts, scores = self._mix(x, cache)
        routed = self.mlp.switch_mlp(experts_input, experts)
        return _end(residual, routed, scores, self.mlp.shared_expert(experts_input))

    def _decodes(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> bool:
        """Whether this is a step of few tokens of one sequence, after at least one other step."""
        if x.shape[0] > 1 or x.shape[1] > FEW_TOKENS or self.training:
            return False
        if x.dtype != self._made_of.dtype or not self._made_of.holds():
            return False
        if self.is_linear:
            return type(cache) is ArraysCache and mask is None and cache.lengths is None and cache[1] is not None
        return type(cache) is KVCache and (mask is None or isinstance(mask, str))


class FewLaunchesMLP(nn.Module):
    """What :func:`swap_trunk` adds to a shared expert."""

    _few: Callable[[mx.array], mx.array]
    _made_of: Snapshot

    def __call__(self, x: mx.array) -> mx.array:
        """The expert's output ``[..., hidden]``."""
        few = x.size <= FEW_TOKENS * x.shape[-1] and x.dtype == self._made_of.dtype and not self.training
        if few and self._made_of.holds():
            return self._few(x)
        y: mx.array = super().__call__(x)
        return y


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
    layers = [layer for _, layer in model.named_modules() if type(layer) in _LAYERS]
    return sum(map(_swap, layers))


_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer)


def _swap(layer: nn.Module) -> bool:
    block = layer.mlp
    if type(block) is not qwen3_next.Qwen3NextSparseMoeBlock or block.sharding_group is not None:
        return False
    mixer = layer.linear_attn if layer.is_linear else layer.self_attn
    inputs = [mixer[name] for name in _INPUTS[type(mixer)]]
    output = mixer[_OUTPUT[type(mixer)]]
    router = [block[name] for name in _ROUTER]
    floats = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *_own_floats(mixer)]
    if not (_alike(inputs) and _alike([output]) and _alike(router) and _same_dtype(floats, inputs, [output], router)):
        return False
    if not layer.is_linear and (type(mixer.rope) is not nn.RoPE or mixer.rope.traditional):
        return False

    routing = _Routing(
        layer.post_attention_layernorm.weight,
        layer.post_attention_layernorm.eps,
        _merge(router),
        block.top_k,
        bool(block.norm_topk_prob),
    )
    make = _delta_net if layer.is_linear else _attention
    _change(layer, FewLaunches)
    layer._mix = make(layer, mixer, inputs, output, routing)
    layer._made_of = Snapshot((mixer, (*_INPUTS[type(mixer)], _OUTPUT[type(mixer)])), (block, _ROUTER))

    shared = block.shared_expert
    linears = [shared[name] for name in _SWIGLU]
    if all(_alike([linear]) for linear in linears) and _same_dtype(floats, linears):
        _change(shared, FewLaunchesMLP)
        shared._few = partial(_mlp, gate=_matrix(linears[0]), up=_matrix(linears[1]), down=_matrix(linears[2]))
        shared._made_of = Snapshot((shared, _SWIGLU))
    return True


_INPUTS = {
    qwen3_5.GatedDeltaNet: ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    qwen3_next.Qwen3NextGatedDeltaNet: ("in_proj_qkvz", "in_proj_ba"),
    qwen3_next.Qwen3NextAttention: ("q_proj", "k_proj", "v_proj"),
}
_OUTPUT = {
    qwen3_5.GatedDeltaNet: "out_proj",
    qwen3_next.Qwen3NextGatedDeltaNet: "out_proj",
    qwen3_next.Qwen3NextAttention: "o_proj",
}
_ROUTER = ("gate", "shared_expert_gate")
_SWIGLU = ("gate_proj", "up_proj", "down_proj")


def _change(layer: nn.Module, way: type) -> None:
    """Give a layer another way to be called; its class keeps its name."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (way, kind), {})  # a wrapper would give its parameters other names


class _Routing(NamedTuple):
    """What follows a layer's mixer: the norm, and the router with the shared expert's gate as its last row."""

    norm: mx.array
    eps: float
    router: Quantized
    top_k: int
    normalize: bool


class _DeltaNet(NamedTuple):
    norm: mx.array
    eps: float
    inputs: Quantized
    layout: Layout
    taps: mx.array
    a_log: mx.array
    dt_bias: mx.array
    gated_norm: mx.array
    gated_eps: float
    output: Quantized


class _Attention(NamedTuple):
    norm: mx.array
    eps: float
    inputs: Quantized
    heads: int
    key_heads: int
    q_norm: mx.array
    k_norm: mx.array
    rope: Rope
    output: Quantized


def _delta_net(
    layer: nn.Module, mixer: nn.Module, inputs: list[nn.Module], output: nn.Module, routing: _Routing
) -> Callable[[mx.array, Any], Routed]:
    weights = _DeltaNet(
        layer.input_layernorm.weight,
        layer.input_layernorm.eps,
        _merge(inputs),
        _layout(mixer),
        mixer.conv1d.weight,
        mixer.A_log,
        mixer.dt_bias,
        mixer.norm.weight,
        mixer.norm.eps,
        _matrix(output),
    )

    def mix(x: mx.array, cache: ArraysCache) -> Routed:
        routed: Routed
        routed, cache[0], cache[1] = _delta_step(x, cache[0], cache[1], weights, routing)
        cache.advance(x.shape[1])
        return routed

    return mix


def _layout(mixer: nn.Module) -> Layout:
    """See :data:`flashmoe_mlx.ops.Layout`."""
    heads, key_dim, value_dim = mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    share = mixer.num_v_heads // heads
    sizes = (key_dim, key_dim, share * value_dim, share * value_dim, share, share)  # of a key head
    starts = [sum(sizes[:part]) for part in range(6)]
    if type(mixer) is qwen3_5.GatedDeltaNet:  # all heads' queries, then all heads' keys, ...
        return tuple((heads * start, size) for start, size in zip(starts, sizes, strict=True))
    stride = starts[4]  # a key head's queries, keys, values and gates, then another's; behind them betas and decays
    return tuple([(start, stride) for start in starts[:4]] + [(heads * stride + i * share, 2 * share) for i in (0, 1)])


def _attention(
    layer: nn.Module, mixer: nn.Module, inputs: list[nn.Module], output: nn.Module, routing: _Routing
) -> Callable[[mx.array, Any], Routed]:
    rope = mixer.rope
    weights = _Attention(
        layer.input_layernorm.weight,
        layer.input_layernorm.eps,
        _merge(inputs),
        mixer.num_attention_heads,
        mixer.num_key_value_heads,
        mixer.q_norm.weight,
        mixer.k_norm.weight,
        Rope(rope.dims, float(rope.base), float(rope.scale), mixer.q_norm.eps),
        _matrix(output),
    )
    scale = mixer.scale

    def mix(x: mx.array, cache: KVCache) -> Routed:
        mask = None if x.shape[1] == 1 else "causal"
        queries, keys, values, gates = _project(x, mx.array([cache.offset]), weights)
        keys, values = cache.update_and_fetch(keys, values)
        attended = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)
        routed: Routed = _attended(x, attended, gates, weights, routing)
        return routed

    return mix


# Compiled once for all layers: weights are arguments.


@mx.compile
def _delta_step(
    x: mx.array, window: mx.array, state: mx.array, weights: _DeltaNet, routing: _Routing
) -> tuple[Routed, mx.array, mx.array]:
    tokens = x.squeeze(0)
    projected = ops.product(mx.fast.rms_norm(tokens, weights.norm, weights.eps), weights.inputs)
    y, window, state = ops.gated_delta(
        projected,
        window,
        state,
        weights.taps,
        weights.a_log,
        weights.dt_bias,
        weights.gated_norm,
        layout=weights.layout,
        eps=weights.gated_eps,
    )
    return _route(tokens, ops.product(y, weights.output), routing), window, state


@mx.compile
def _project(x: mx.array, position: mx.array, weights: _Attention) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Queries, keys, values ``[1, heads, tokens, head_dim]``, and the gates of the output ``[tokens, heads, dim]``."""
    projected = ops.product(mx.fast.rms_norm(x.squeeze(0), weights.norm, weights.eps), weights.inputs)
    heads, key_heads, head_dim = weights.heads, weights.key_heads, weights.q_norm.size
    queries, keys = ops.norm_rope(
        projected, weights.q_norm, weights.k_norm, position, heads=heads, key_heads=key_heads, rope=weights.rope
    )
    values = projected[None, :, -key_heads * head_dim :].reshape(1, -1, key_heads, head_dim).swapaxes(1, 2)
    gates = projected[:, : 2 * heads * head_dim].reshape(-1, heads, 2, head_dim)[:, :, 1]
    return queries, keys, values, gates


@mx.compile
def _attended(x: mx.array, attended: mx.array, gates: mx.array, weights: _Attention, routing: _Routing) -> Routed:
    y = attended.squeeze(0).swapaxes(0, 1) * mx.sigmoid(gates)
    return _route(x.squeeze(0), ops.product(y.flatten(1), weights.output), routing)


def _route(x: mx.array, y: mx.array, routing: _Routing) -> Routed:
    residual, experts_input = ops.add_norm(x, y, routing.norm, routing.eps)
    experts, scores = ops.route(ops.product(experts_input, routing.router), routing.top_k, routing.normalize)
    return residual, experts_input[None], experts[None], scores


@mx.compile
def _mlp(x: mx.array, gate: Quantized, up: Quantized, down: Quantized) -> mx.array:
    tokens = x.reshape(-1, x.shape[-1])
    slots = mx.array([[0]] * tokens.shape[0], mx.uint32)  # a constant; zeros() would be another launch
    return ops.product(ops.gate_up(tokens, slots, gate, up).squeeze(1), down).reshape(x.shape)


@mx.compile
def _end(residual: mx.array, routed: mx.array, scores: mx.array, shared: mx.array) -> mx.array:
    return ops.combine(residual, routed.squeeze(0), scores, shared.squeeze(0))[None]


def _matrix(linear: nn.Module) -> Quantized:
    parts = linear.weight[None], linear.scales[None], linear.biases[None]
    mx.eval(parts)  # here, and not in another thread
    return Quantized(*parts, linear.group_size, linear.bits)


def _merge(linears: list[nn.Module]) -> Quantized:
    """One matrix of several layers' rows; their own parameters become parts of it."""
    rows = [linear.weight.shape[0] for linear in linears]
    ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    merged = {}
    for name in ("weight", "scales", "biases"):
        whole = mx.concatenate([linear[name] for linear in linears])
        parts, merged[name] = mx.split(whole, ends), whole[None]  # they share the memory of the whole
        mx.eval(parts, merged[name])
        for linear, part in zip(linears, parts, strict=True):
            linear[name] = part
    return Quantized(**merged, group_size=linears[0].group_size, bits=linears[0].bits)


def _alike(linears: list[nn.Module]) -> bool:
    """Whether they are plain layers of one affine quantisation."""
    if any(type(each) is not nn.QuantizedLinear or each.mode != "affine" or "bias" in each for each in linears):
        return False
    return len({(linear.group_size, linear.bits) for linear in linears}) == 1


def _own_floats(mixer: nn.Module) -> list[mx.array]:
    """Parameters of a mixer that are not quantised and that kernels read with the dtype of activations."""
    if type(mixer) is qwen3_next.Qwen3NextAttention:
        return [mixer.q_norm.weight, mixer.k_norm.weight]
    return [mixer.conv1d.weight]


def _same_dtype(floats: Iterable[mx.array], *groups: list[nn.Module]) -> bool:
    scales = [part for linears in groups for linear in linears for part in (linear.scales, linear.biases)]
    return len({array.dtype for array in (*floats, *scales)}) == 1
