"""Runs the decode step of each kind of layer once, so that a self-check sees every kernel that a model uses."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe_mlx.layers.fused_decoder import FusedDecoderLayer
from flashmoe_mlx.layers.switch import ResidentSwitchGLU, StreamedSwitchGLU
from flashmoe_mlx.ops.dispatch import Backend, observe_kernels
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.products import swiglu_experts
from flashmoe_mlx.ops.self_check import SelfCheck

# Positions before the decode step: more than one split of the attention kernel.
_PROMPT = 40
# Random experts stand in for those on disk.
_EXPERTS = 2


def check_kernels(model: nn.Module, top_k: int, backend: Backend) -> None:
    """Compare each GPU kernel that a model uses with its reference, in the model's own shapes and dtypes.

    It costs little besides the compilations that a first token needs anyway. One that raises or differs is disabled
    with a warning; see :class:`~flashmoe_mlx.ops.self_check.SelfCheck`.

    Args:
        model (nn.Module): With streamed or resident experts and fused layers, before its first call.
        top_k (int): Routed experts per token.
        backend (Backend): The model's.
    """
    with observe_kernels(SelfCheck(backend)), _compile_off():
        seen = set()
        for _, module in model.named_modules():
            if isinstance(module, StreamedSwitchGLU | ResidentSwitchGLU) and module.experts.matrices is not None:
                _run_experts(module.experts.matrices, top_k, backend)
            elif isinstance(module, FusedDecoderLayer):
                shapes = tuple((name, array.shape, array.dtype) for name, array in tree_flatten(module.parameters()))
                if shapes not in seen:
                    seen.add(shapes)
                    _run_layer(module)


def _run_experts(like: tuple[Quantized, Quantized, Quantized], top_k: int, backend: Backend) -> None:
    gate, up, down = (_random_matrices(matrix, key) for key, matrix in enumerate(like))
    x = mx.random.normal((1, 1, down.rows), gate.scales.dtype, key=mx.random.key(0))
    swiglu_experts(gate, up, down, backend)(x, mx.arange(top_k, dtype=mx.uint32)[None, None] % _EXPERTS)


def _run_layer(layer: FusedDecoderLayer) -> None:
    """Run a prompt and a decode step of a layer, without its routed experts."""
    norm = layer.input_layernorm.weight
    prompt, x = (
        mx.random.normal((1, tokens, norm.size), norm.dtype, key=mx.random.key(tokens)) for tokens in (_PROMPT, 1)
    )
    cache = ArraysCache(size=2) if layer.is_linear else KVCache()
    switch, layer.mlp.switch_mlp = layer.mlp.switch_mlp, _RandomExperts()
    try:
        layer(prompt, None if layer.is_linear else "causal", cache)
        layer(x, None, cache)
    finally:
        layer.mlp.switch_mlp = switch


class _RandomExperts(nn.Module):
    """Stands in for a switch layer whose experts are on disk."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.random.normal((*indices.shape, x.shape[-1]), x.dtype, key=mx.random.key(1))


def _random_matrices(like: Quantized, key: int) -> Quantized:
    """Return a few matrices of the same shape whose elements have mean 0 and variance near ``1 / columns``."""
    _, rows, words = like.weight.shape
    # MLX's random integers have 24 random bits.
    halves = mx.random.randint(0, 2**16, (_EXPERTS, rows, 2 * words), mx.uint16, key=mx.random.key(key))
    # Standard deviation of an element if the scale is 1.
    spread = ((4**like.bits - 1) / 12) ** 0.5
    scale = (like.group_size * like.scales.shape[-1]) ** -0.5 / spread
    shape = (_EXPERTS, *like.scales.shape[1:])
    scales = mx.random.uniform(0.5 * scale, 1.5 * scale, shape, like.scales.dtype, key=mx.random.key(key))
    return like._replace(weight=halves.view(mx.uint32), scales=scales, biases=-scales * ((2**like.bits - 1) / 2))


@contextmanager
def _compile_off() -> Iterator[None]:
    """Run functions that ``mx.compile`` returned as they were written."""
    traced: list[mx.array] = []

    @mx.compile
    def probe(x: mx.array) -> mx.array:
        traced.append(x)
        return x

    mx.eval(probe(mx.ones(1)), probe(mx.ones(1)))
    # MLX does not tell. A compiled function runs once for many calls.
    compiles = len(traced) == 1
    mx.disable_compile()
    try:
        yield
    finally:
        if compiles:
            mx.enable_compile()
