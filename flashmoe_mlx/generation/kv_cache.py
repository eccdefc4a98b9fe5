"""The KV cache of a model: its size limit, its quantization, and its memory."""

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, QuantizedKVCache, make_prompt_cache

# Layers that do not grow with the context.
_BOUNDED = (mlx_cache.RotatingKVCache, ArraysCache, ChunkedKVCache)
# Tokens at the start that a limited cache never drops, as in mlx-lm.
_KEPT_AT_START = 4


class RotatingKVCache(mlx_cache.RotatingKVCache):  # type: ignore[misc]  # mlx-lm is untyped
    """mlx-lm's KV cache of the last tokens, which stays as it is when the others are quantized.

    mlx-lm cannot quantize it and raises NotImplementedError. The class has mlx-lm's name because files of prompt caches
    contain it.
    """

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Self:
        """Return this cache."""
        return self


def make_kv_cache(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """Return an empty cache of a model, one item per layer.

    Args:
        model (nn.Module): mlx-lm's or ours.
        max_kv_size (int, optional): Tokens that layers of full attention keep: the first 4 and the last ones. Unlike
            mlx-lm's ``make_prompt_cache``, this also limits models that make their own cache, such as hybrid ones.
            Their sliding windows and recurrent states stay as they are. Default: ``None``, they keep all tokens.

    Raises:
        ValueError: The size is too small, or the model's cache cannot be limited.
    """
    if max_kv_size is not None and max_kv_size <= _KEPT_AT_START:
        raise ValueError(
            f"max_kv_size is {max_kv_size}: it must be at least {_KEPT_AT_START + 1}, because the first "
            f"{_KEPT_AT_START} tokens are always kept"
        )
    cache = fit_rotating(make_prompt_cache(model))
    if max_kv_size is None:
        return cache
    limited = [
        RotatingKVCache(max_size=max_kv_size, keep=_KEPT_AT_START) if type(layer) is KVCache else layer
        for layer in cache
    ]
    if others := {type(layer).__name__ for layer in limited if not isinstance(layer, _BOUNDED)}:
        raise ValueError(f"this model's {others.pop()} cannot be limited: leave out --max-kv-size")
    return limited


def fit_rotating(cache: Sequence[Any]) -> list[Any]:
    """Return a cache whose rotating layers stay as they are when the others are quantized."""
    return [
        RotatingKVCache.from_state(layer.state) if type(layer) is mlx_cache.RotatingKVCache else layer
        for layer in cache
    ]


def check_quantization(
    model: nn.Module, kv_bits: int | None, kv_group_size: int, max_kv_size: int | None = None
) -> None:
    """Try a quantized KV cache with two tokens, before there is a prompt.

    Args:
        model (nn.Module): From :func:`flashmoe_mlx.load`.
        kv_bits (int, optional): As mlx-lm's. ``None`` does nothing.
        kv_group_size (int): As mlx-lm's.
        max_kv_size (int, optional): As of :func:`make_kv_cache`.

    Raises:
        ValueError: The model's attention does not work with it, or no layer can be quantized.
        OSError: The experts of the two tokens could not be read.
    """
    if kv_bits is None:
        return
    cache = make_kv_cache(model, max_kv_size)
    try:
        for _ in range(2):
            mx.eval(model(mx.array([[0]]), cache=cache))
            maybe_quantize_kv_cache(cache, quantized_kv_start=0, kv_group_size=kv_group_size, kv_bits=kv_bits)
    except (OSError, MemoryError):
        raise
    # Each family's attention fails in its own way.
    except Exception as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"--kv-bits {kv_bits} with --kv-group-size {kv_group_size} does not work with this model: {reason}. Leave "
            "it out or choose other values"
        ) from error
    if not any(isinstance(layer, QuantizedKVCache) for layer in cache):
        reason = "this model has no layer whose KV cache can be quantized"
        if max_kv_size is not None:
            reason = "a KV cache of limited size cannot be quantized: leave out --kv-bits or --max-kv-size"
        raise ValueError(f"--kv-bits {kv_bits} has no effect: {reason}")


def refuse_context(
    model: nn.Module,
    tokens: int,
    prefill_step_size: int,
    *,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
) -> None:
    """Refuse a context whose KV cache, with the attention scores of a small chunk, would not fit in memory.

    Args:
        model (nn.Module): From :func:`flashmoe_mlx.load`.
        tokens (int): Length of prompt and answer together.
        prefill_step_size (int): Tokens in a prefill chunk. A limited cache keeps all of the last one.
        max_kv_size (int, optional): As of :func:`make_kv_cache`.
        kv_bits (int, optional): As mlx-lm's. A cache that stays shorter than ``quantized_kv_start`` is not quantized.
        kv_group_size (int): As mlx-lm's.
        quantized_kv_start (int): As mlx-lm's.

    Raises:
        MemoryError: It does not fit.
    """
    kept = tokens if max_kv_size is None else min(tokens, max_kv_size + prefill_step_size - 1)
    model.streaming.refuse_context(kept, kv_bits if tokens > quantized_kv_start else None, kv_group_size)


def plan_prefill(
    model: nn.Module,
    tokens: int,
    prefill_step_size: int | None = None,
    *,
    cached: int = 0,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
) -> Any:
    """Return the chunks of a prompt, see :meth:`Streaming.plan_prefill`.

    Args:
        model (nn.Module): From :func:`flashmoe_mlx.load`.
        tokens (int): Length of the prompt.
        prefill_step_size (int, optional): Tokens in a chunk that the user asked for. Default: as many as memory allows.
        cached (int): Tokens at the beginning of the prompt that are in the KV cache already. Default: ``0``.
        max_kv_size (int, optional): As of :func:`make_kv_cache`.
        kv_bits (int, optional): As mlx-lm's.
        kv_group_size (int): As mlx-lm's.
        quantized_kv_start (int): As mlx-lm's.
    """
    return model.streaming.plan_prefill(
        tokens,
        cached=cached,
        step_size=prefill_step_size,
        window=max_kv_size,
        kv_bits=kv_bits if tokens > quantized_kv_start else None,
        kv_group_size=kv_group_size,
    )


def can_roll_back(cache: Sequence[Any]) -> bool:
    """Say whether a cache can be trimmed to any prefix, now and when it has seen more tokens."""
    layers = [each for layer in cache for each in getattr(layer, "caches", (layer,))]
    # A sliding window forgets its first tokens once it is full.
    windows = (mlx_cache.RotatingKVCache, ChunkedKVCache)
    return all(layer.is_trimmable() and not isinstance(layer, windows) for layer in layers)
