"""Fused decode steps of decoder layers: the parts that do not depend on a model family."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.layers.decode_step import is_decode_step
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.ops.norm import Norm

RouterOutputs = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
"""Everything of a layer up to its experts: the residual stream and the experts' input, ``[1, tokens, hidden]``, expert
numbers ``[1, tokens, top_k]``, scores ``[1, tokens, top_k + 1]``, and the shared expert's output
``[1, tokens, hidden]``."""


class WeightIdentity:
    """Identity of the weights a fused step was built from; the step is skipped once any of them was replaced.

    Args:
        dtype (mx.Dtype): Of the activations that the step computes.
        parents (tuple): Modules, each with the names of those of its children that the step uses.
    """

    def __init__(self, dtype: mx.Dtype, *parents: tuple[nn.Module, Iterable[str]]):
        self.dtype = dtype
        children = [(parent, name, parent[name]) for parent, names in parents for name in names]
        arrays = [(linear, "scales", linear.scales) for _, _, linear in children]
        self._weights = [*children, *arrays]

    def holds(self) -> bool:
        """Return whether the weights are still the same objects: no adapter, no other dtype, no update."""
        # Runs for every layer of every token, and takes 1 us.
        return all(module.get(name) is value for module, name, value in self._weights)


class NormHandoff:
    """The norm of a layer's input, computed at the end of the layer before and handed out once."""

    _computed: tuple[mx.array, mx.array] | None = None

    def put(self, x: mx.array, normed: mx.array) -> None:
        """Keep the norm of ``x``."""
        self._computed = x, normed

    def take(self, x: mx.array) -> mx.array | None:
        """Return the norm of this very array, or ``None`` if another one's or none was computed."""
        computed, self._computed = self._computed, None
        return computed[1] if computed is not None and computed[0] is x else None


@dataclass(frozen=True, slots=True)
class FusedStep:
    """A layer's decode step in few kernels.

    Args:
        mix (Callable): From the layer's input and its norm, each ``[1, tokens, hidden]``, and its cache to
            :data:`RouterOutputs`.
        end (Callable): From the residual stream, the routed experts' outputs, the scores and the shared expert's output
            to the layer's output and its norm.
        weights (WeightIdentity): What it was built from.
        norm (Norm): Of the layer's input.
        norm_in (NormHandoff): From the layer before.
        norm_out (NormHandoff): To the layer after.
    """

    mix: Callable[[mx.array, mx.array, Any], Sequence[mx.array]]
    end: Callable[[mx.array, mx.array, mx.array, mx.array], Sequence[mx.array]]
    weights: WeightIdentity
    norm: Norm
    norm_in: NormHandoff
    norm_out: NormHandoff


class FusedDecoderLayer(nn.Module):
    """Adds a fused decode step to a decoder layer; everything else, prompts above all, is mlx-lm's own code."""

    _fused: FusedStep

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """Return the layer's output ``[batch, tokens, hidden]``, updating mlx-lm's caches."""
        step = self._fused
        if not self._serves(step.weights, x, mask, cache):
            y: mx.array = super().__call__(x, mask, cache)
            return y
        normed = step.norm_in.take(x)
        if normed is None:
            normed = self.input_layernorm(x)
        residual, experts_input, experts, scores, shared = step.mix(x, normed, cache)
        switch = self.mlp.switch_mlp
        if isinstance(switch, StreamedSwitchGLU):
            routed = switch(experts_input, experts, overlap=shared)
        else:
            routed = switch(experts_input, experts)
        y, normed = step.end(residual, routed, scores, shared)
        step.norm_out.put(y, normed)
        return y

    def _serves(self, weights: WeightIdentity, x: mx.array, mask: mx.array | str | None, cache: Any) -> bool:
        """Return whether this is a decode step of one sequence, after at least one other step in the same dtype."""
        if x.shape[0] > 1 or not is_decode_step(x) or self.training:
            return False
        if x.dtype != weights.dtype or not weights.holds():
            return False
        if self.is_linear:
            known = type(cache) is ArraysCache and mask is None and cache.lengths is None and cache[1] is not None
            return known and cache[0].dtype == x.dtype
        known = type(cache) is KVCache and (mask is None or isinstance(mask, str))
        return known and (cache.keys is None or cache.keys.dtype == x.dtype)


def fuse(layer: nn.Module, step: FusedStep) -> None:
    """Give a decoder layer a fused step. It stays the same object in the same place."""
    kind = type(layer)
    # A wrapper would rename its parameters.
    layer.__class__ = type(kind.__name__, (FusedDecoderLayer, kind), {})
    layer._fused = step
