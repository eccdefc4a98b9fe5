"""Memory of a context: KV cache bytes and prefill chunk sizes."""

from collections.abc import Mapping
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from flashmoe_mlx.model.budget import gigabytes
from flashmoe_mlx.system.memory import available_memory

# Fewest and most tokens of a prefill chunk.
_CHUNKS = (512, 8192)


def refuse_context(tokens: int, token_nbytes: float) -> None:
    """Refuse a context whose KV cache would make the machine swap.

    Args:
        tokens (int): Of prompt and answer.
        token_nbytes (float): Bytes per token.

    Raises:
        MemoryError: The KV cache is larger than the free memory.
    """
    free = available_memory()
    if tokens * token_nbytes > free:
        raise MemoryError(
            f"the KV cache of {tokens:,} tokens needs {gigabytes(tokens * token_nbytes)}, and {gigabytes(free)} are "
            "free: shorten the prompt, generate fewer tokens, keep fewer (--max-kv-size) or quantize them (--kv-bits 8)"
        )


def kv_token_nbytes(config: Mapping[str, Any], layers: int, itemsize: int) -> int:
    """Return the bytes that each token of a context adds to the KV cache. A lower bound where layers differ in width.

    Args:
        config (Mapping): config.json.
        layers (int): Layers whose cache grows, see :func:`growing_layers`.
        itemsize (int): Bytes of an activation.
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
    """Return the size of a quantized array relative to the original: its values, and a scale and bias per group.

    Args:
        bits (int): Per value.
        group_size (int): Values per group.
        itemsize (int): Bytes of an original value, of a scale and of a bias.
    """
    return bits / (8 * itemsize) + 2 / group_size


def growing_layers(model: nn.Module) -> int:
    """Return how many layers of a model cache every token; others have a window or a recurrent state."""
    caches = make_prompt_cache(model)
    caches = [each for cache in caches for each in (cache.caches if isinstance(cache, CacheList) else [cache])]
    return sum(type(cache) is KVCache for cache in caches)


def prefill_step_size(free_nbytes: int, token_nbytes: int) -> int:
    """Return the tokens of a prefill chunk: a power of two from 512 to 8192.

    Each chunk reads the experts it needs once, so larger chunks read less in total. Activations may take a quarter of
    the free memory; the rest is for the KV cache and the OS page cache.

    Args:
        free_nbytes (int): Bytes that trunk and slots leave.
        token_nbytes (int): Bytes of activations per token, see :func:`prefill_token_nbytes`.
    """
    fewest, tokens = _CHUNKS
    while tokens > fewest and tokens * token_nbytes > free_nbytes // 4:
        tokens //= 2
    return tokens


def prefill_token_nbytes(
    config: Mapping[str, Any], *, top_k: int, hidden: int, intermediate: int, itemsize: int
) -> int:
    """Return an upper bound of the activation bytes per token of a chunk, in the layer that needs most.

    It is the sum of

    - ``top_k * (4 * hidden + 3 * intermediate)`` values for the routed experts, sorted by expert: inputs, gate, up,
      activation and outputs, and the outputs again in the order of waves, of tokens, and weighted;
    - ``16 * hidden`` for the trunk: residual stream, norms, projections, shared expert;
    - ``2 * heads * 8192`` for attention scores and their softmax, which MLX materializes for heads of 256 dimensions
      and on a CPU; a context of four times 8192 takes all free memory instead of a quarter, at worst;
    - without Metal, one GatedDeltaNet state, because mlx-lm then keeps that of every token of a chunk.

    Args:
        config (Mapping): config.json.
        top_k (int): Experts per token.
        hidden (int): Width of the model.
        intermediate (int): Width of an expert.
        itemsize (int): Bytes of an activation.
    """
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or hidden // 64
    values = top_k * (4 * hidden + 3 * intermediate) + 16 * hidden + 2 * heads * _CHUNKS[1]
    if not mx.metal.is_available():
        state = [config.get(f"linear_{name}", 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim")]
        values += prod(state)
    return values * itemsize
