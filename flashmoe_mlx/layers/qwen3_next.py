"""Decoder layers of Qwen3.5 and Qwen3-Next that decode in few launches.

What a step of few tokens costs is, next to reading weights, launches and the host's work for each of them. mlx-lm's
layers make 36 to 44; these make 8 or 12: projections of the same input are one product, what lies between products is
one kernel, and a layer ends with the norm that the next one begins with. The host's work is kept by ``mx.compile``.
All else, prompts above all, runs through mlx-lm's own code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.layers.shared_expert import few_tokens
from flashmoe_mlx.ops import gated_delta as trunk_ops
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.gated_delta import Rope
from flashmoe_mlx.ops.products import Dense, Fused, native_kernels
from flashmoe_mlx.system.huge_pages import use_large_pages

# What a layer makes until its experts are known: the residual and the experts' input [1, tokens, hidden], expert
# numbers [1, tokens, top_k], scores [1, tokens, top_k + 1], and the shared expert's output [1, tokens, hidden].
Routed = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]


class Norm(NamedTuple):
    """An RMS norm: its weight ``[hidden]``, and what keeps it from dividing by zero."""

    weight: mx.array
    eps: float


class Snapshot:
    """The linear layers that another way was made of, so that it is not taken once they were changed.

    Args:
        dtype (mx.Dtype): of the activations that they are for.
        parents (tuple): modules, each with the names of those of its children that count.
    """

    def __init__(self, dtype: mx.Dtype, *parents: tuple[nn.Module, Iterable[str]]):
        self.dtype = dtype
        children = [(parent, name, parent[name]) for parent, names in parents for name in names]
        arrays = [(linear, "scales", linear.scales) for _, _, linear in children]
        self._modules, self._names, self._values = zip(*children, *arrays, strict=True)

    def holds(self) -> bool:
        """Whether they still are what they were: without adapters, in the same dtype, with the same weights."""
        return all(map(is_, map(dict.get, self._modules, self._names), self._values))  # for every layer of every token


class Prepared:
    """What was made of an array before anybody asked for it."""

    _made: tuple[mx.array, mx.array] | None = None

    def put(self, x: mx.array, y: mx.array) -> None:
        """Keep what was made of ``x``."""
        self._made = x, y

    def take(self, x: mx.array) -> mx.array | None:
        """What was made of this very array, if it was; once."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] is x else None


@dataclass(slots=True)
class Way:
    """How a layer computes a step of few tokens.

    Args:
        mix (Callable): all up to the experts, see :data:`Routed`, of the layer's input and its norm,
            ``[1, tokens, hidden]``, and a cache.
        end (Callable): the layer's output and its norm, of the residual, the experts' outputs, their scores, and the
            shared expert's output.
        made_of (Snapshot): what it was made of.
        norm (Norm): of its input.
        normed (Prepared): the norms of inputs, from the layer before.
        next_normed (Prepared): likewise, for the layer behind it.
        beside (mx.array, optional): what to launch together with the experts of the step that runs.
    """

    mix: Callable[[mx.array, mx.array, Any], Sequence[mx.array]]
    end: Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
    made_of: Snapshot
    norm: Norm
    normed: Prepared
    next_normed: Prepared
    beside: mx.array | None = None


class FewLaunches(nn.Module):
    """What :func:`swap_trunk` adds to a decoder layer: another way to compute a step of few tokens."""

    _way: Way

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """The layer's output ``[batch, tokens, hidden]``, with mlx-lm's caches."""
        way = self._way
        if not self._decodes(way.made_of, x, mask, cache):
            y: mx.array = super().__call__(x, mask, cache)
            return y
        normed = way.normed.take(x)
        if normed is None:
            normed = self.input_layernorm(x)
        residual, experts_input, experts, scores, shared = way.mix(x, normed, cache)
        way.beside = shared
        try:
            routed = self.mlp.switch_mlp(experts_input, experts)
        finally:
            way.beside = None
        y, normed = way.end(residual, routed, scores, shared)
        way.next_normed.put(y, normed)
        return y

    def start(self, _: mx.array) -> mx.array | None:
        """What is to be launched beside the experts of this step, if it is one of few tokens: the shared expert."""
        return self._way.beside

    def _decodes(self, made_of: Snapshot, x: mx.array, mask: mx.array | str | None, cache: Any) -> bool:
        """Whether this is a step of few tokens of one sequence, after at least one other step in the same dtype."""
        if x.shape[0] > 1 or not few_tokens(x) or self.training:
            return False
        if x.dtype != made_of.dtype or not made_of.holds():
            return False
        if self.is_linear:
            known = type(cache) is ArraysCache and mask is None and cache.lengths is None and cache[1] is not None
            return known and cache[0].dtype == x.dtype
        known = type(cache) is KVCache and (mask is None or isinstance(mask, str))
        return known and (cache.keys is None or cache.keys.dtype == x.dtype)


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
    merged, layout, out = _merge(inputs), trunk_ops.layout_of(mixer), _matrix(output)
    taps, a_log, dt_bias, norm = mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, _norm(mixer.norm)

    @Fused
    def step(x: mx.array, normed: mx.array, window: mx.array, state: mx.array) -> tuple[mx.array, ...]:
        projected = ops.linear(normed, *merged)
        y, window, state = trunk_ops.gated_delta(
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
        queries, keys, values = trunk_ops.norm_rope(
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
            y = trunk_ops.attend(queries, keys, values, position, projected, scale)
            return _route(x, ops.linear(y, *out), block)

        return attended

    def mix(x: mx.array, normed: mx.array, cache: KVCache) -> Sequence[mx.array]:
        position = _position(cache.offset)
        queries, keys, values, projected = project(normed, position)
        _append(cache, keys, values)
        attended = behind(cache.keys.shape[2])
        return attended(cache.keys, cache.values, queries, projected, position, x)

    return mix


def _append(cache: KVCache, keys: mx.array, values: mx.array) -> None:
    """``update_and_fetch``, without the two views that it returns if there is room."""
    begin, end = cache.offset, cache.offset + keys.shape[2]
    if cache.keys is None or end > cache.keys.shape[2]:
        cache.update_and_fetch(keys, values)
        return
    cache.keys[:, :, begin:end] = keys
    cache.values[:, :, begin:end] = values
    cache.offset = end


@lru_cache(maxsize=1)
def _position(offset: int) -> mx.array:
    """The position of a token, made once for all layers."""
    return mx.array([offset])


def _route(x: mx.array, y: mx.array, block: _Block) -> Routed:
    residual, experts_input = trunk_ops.add_norm(x, y, *block.norm)
    logits, hidden = trunk_ops.ask(experts_input, block.router, block.gate, block.up)
    experts, scores = trunk_ops.route(logits, block.top_k, block.normalize)
    return residual, experts_input, experts, scores, ops.linear(hidden, *block.down)


def _end(norm: Norm) -> Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    @mx.compile
    def end(residual: mx.array, routed: mx.array, scores: mx.array, shared: mx.array) -> tuple[mx.array, mx.array]:
        return trunk_ops.combine(residual, routed, scores, shared, *norm)

    return end


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.eps)


def _matrix(linear: nn.Module) -> Dense:
    return Dense(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits)


def _merge(linears: list[nn.Module]) -> Dense:
    """One matrix of several layers' rows; their own parameters become parts of it."""
    rows = [linear.weight.shape[0] for linear in linears]
    ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    merged = {}
    for name in ("weight", "scales", "biases"):
        merged[name] = mx.concatenate([linear[name] for linear in linears])
        parts = mx.split(merged[name], ends)  # they share the memory of the whole
        mx.eval(parts, merged[name])
        use_large_pages(merged[name])
        for linear, part in zip(linears, parts, strict=True):
            linear[name] = part
    return Dense(**merged, group_size=linears[0].group_size, bits=linears[0].bits)


def _alike(linears: list[nn.Module]) -> bool:
    """Whether they are plain layers of one affine quantisation."""
    if any(not isinstance(each, nn.QuantizedLinear) or each.mode != "affine" or "bias" in each for each in linears):
        return False
    return len({(linear.group_size, linear.bits) for linear in linears}) == 1


def _own_floats(mixer: nn.Module) -> list[mx.array]:
    """Parameters of a mixer that are not quantised and that kernels read with the dtype of activations."""
    if isinstance(mixer, qwen3_next.Qwen3NextAttention):
        return [mixer.q_norm.weight, mixer.k_norm.weight]
    return [mixer.conv1d.weight]


def _fit(floats: list[mx.array], *groups: list[nn.Module]) -> bool:
    """Whether kernels can read them. Native ones take any scales, if those of a matrix are of one dtype."""
    dtypes = {array.dtype for array in floats}
    of_groups = [{part.dtype for linear in linears for part in (linear.scales, linear.biases)} for linears in groups]
    if native_kernels(floats[0]) is None:
        return len(dtypes.union(*of_groups)) == 1
    return all(len(each) == 1 for each in (dtypes, *of_groups))
