"""Fused decode steps for decoder layers: the parts that do not depend on a model family."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.ops.dispatch import few_tokens, native_kernels
from flashmoe_mlx.ops.matrices import Dense
from flashmoe_mlx.ops.norm import combine
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


def _end(norm: Norm) -> Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    @mx.compile
    def end(residual: mx.array, routed: mx.array, scores: mx.array, shared: mx.array) -> tuple[mx.array, mx.array]:
        return combine(residual, routed, scores, shared, *norm)

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


def _fit(floats: list[mx.array], *groups: list[nn.Module]) -> bool:
    """Whether kernels can read them. Native ones take any scales, if those of a matrix are of one dtype."""
    dtypes = {array.dtype for array in floats}
    of_groups = [{part.dtype for linear in linears for part in (linear.scales, linear.biases)} for linears in groups]
    if native_kernels(floats[0]) is None:
        return len(dtypes.union(*of_groups)) == 1
    return all(len(each) == 1 for each in (dtypes, *of_groups))
