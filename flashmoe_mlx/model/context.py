"""Memory of a context: KV cache bytes and prefill chunk sizes."""

from collections.abc import Mapping
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from flashmoe_mlx.model.budget import _gb
from flashmoe_mlx.system.memory import free_memory

_CHUNKS = (512, 8192)  # the fewest and the most tokens of a prompt at a time


def refuse_context(tokens: int, token_nbytes: float) -> None:
    """Refuse a context whose KV cache would have to be swapped.

    Raises:
        MemoryError: it is larger than the free memory.
    """
    free = free_memory()
    if tokens * token_nbytes > free:
        raise MemoryError(
            f"the KV cache of {tokens:,} tokens needs {_gb(tokens * token_nbytes)} and {_gb(free)} are free: "
            "shorten the prompt, generate fewer tokens, keep fewer (--max-kv-size) or smaller ones (--kv-bits 8)"
        )


def kv_token_nbytes(config: Mapping[str, Any], layers: int, itemsize: int) -> int:
    """Bytes that each token of the context needs for good, at least. More only where a family has wider layers.

    Args:
        config (Mapping): config.json.
        layers (int): how many remember every token, see :func:`growing_layers`.
        itemsize (int): bytes of a value as it is computed.
    """
    config = config.get("text_config") or config
    if rank := config.get("kv_lora_rank"):
        values = rank + config.get("qk_rope_head_dim", 0)
    else:
        heads = config.get("num_attention_heads") or 1
        width = config.get("head_dim") or config.get("hidden_size", 0) // heads
        values = 2 * (config.get("num_key_value_heads") or heads) * width
    return int(layers * values * itemsize)


def quantized_share(bits: int, group_size: int, itemsize: int) -> float:
    """What quantising leaves of an array's bytes: the bits of each value, and a scale and a bias for each group.

    Args:
        bits (int): of a value.
        group_size (int): values in a group.
        itemsize (int): bytes of a value before, and of scale and bias.
    """
    return bits / (8 * itemsize) + 2 / group_size


def growing_layers(model: nn.Module) -> int:
    """How many layers of a model remember every token; others have a window or a state."""
    caches = make_prompt_cache(model)
    caches = [each for cache in caches for each in (cache.caches if isinstance(cache, CacheList) else [cache])]
    return sum(type(cache) is KVCache for cache in caches)


def prefill_step_size(free_nbytes: int, token_nbytes: int) -> int:
    """How many tokens of a prompt to process at a time: a power of two from 512 to 8192.

    Each chunk of a prompt reads the experts it needs once, so larger chunks read less in all. Their activations may
    take a quarter of the free memory: the rest is the KV cache's and the OS page cache's.

    Args:
        free_nbytes (int): bytes that trunk and slots leave.
        token_nbytes (int): bytes of activations per token, see :func:`prefill_token_nbytes`.
    """
    fewest, tokens = _CHUNKS
    while tokens > fewest and tokens * token_nbytes > free_nbytes // 4:
        tokens //= 2
    return tokens


def prefill_token_nbytes(
    config: Mapping[str, Any], *, top_k: int, hidden: int, intermediate: int, itemsize: int
) -> int:
    """Bytes of activations that each token of a chunk needs, at the layer that needs most. An upper bound, of

    - ``top_k * (4 * hidden + 3 * intermediate)`` values for the routed experts, which mlx-lm sorts by expert: their
      inputs, gate, up, activation and outputs, and the outputs again in the order of waves, of tokens, and weighted;
    - ``16 * hidden`` for the trunk: residual stream, norms, projections, shared expert;
    - ``2 * heads * 8192`` for attention scores and their softmax, which MLX writes out for heads of 256 dimensions and
      on a CPU; a context of four times 8192 takes the whole of the free memory instead of a quarter, at worst;
    - without Metal one state of a GatedDeltaNet layer, because mlx-lm keeps that of every token of a chunk there.

    Args:
        config (Mapping): config.json.
        top_k (int): experts a token uses.
        hidden (int): width of the model.
        intermediate (int): width of an expert.
        itemsize (int): bytes of a value as it is computed.
    """
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or hidden // 64
    values = top_k * (4 * hidden + 3 * intermediate) + 16 * hidden + 2 * heads * _CHUNKS[1]
    if not mx.metal.is_available():
        state = [config.get(f"linear_{name}", 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim")]
        values += prod(state)
    return values * itemsize
