"""Memory of a context: the bytes of its KV cache."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from flashmoe_mlx.checkpoint.folder import language_config
from flashmoe_mlx.model.budget import gigabytes
from flashmoe_mlx.system.memory import available_memory
from flashmoe_mlx.system.metal import max_buffer_nbytes


def refuse_context(tokens: int, token_nbytes: float, scores_nbytes: int) -> None:
    """Refuse a context that would make the machine swap, or that needs a larger array than the GPU allows.

    Args:
        tokens (int): Of prompt and answer.
        token_nbytes (float): Bytes of the KV cache per token.
        scores_nbytes (int): Bytes of the attention scores of the smallest prefill chunk.

    Raises:
        MemoryError: KV cache and scores are larger than the free memory, or the scores than one array may be.
    """
    if scores_nbytes > (limit := max_buffer_nbytes()):
        raise MemoryError(
            f"the attention scores of {tokens:,} tokens need an array of {gigabytes(scores_nbytes)}, and the GPU "
            f"allows {gigabytes(limit)}: shorten the prompt, generate fewer tokens or keep fewer (--max-kv-size)"
        )
    free, needed = available_memory(), tokens * token_nbytes + scores_nbytes
    if needed > free:
        scores = f" with {gigabytes(scores_nbytes)} of attention scores" if scores_nbytes > needed // 100 else ""
        raise MemoryError(
            f"the KV cache of {tokens:,} tokens needs {gigabytes(needed)}{scores}, and {gigabytes(free)} are free: "
            "shorten the prompt, generate fewer tokens, keep fewer (--max-kv-size) or quantize them (--kv-bits 8)"
        )


def kv_token_nbytes(config: Mapping[str, Any], layers: int, itemsize: int) -> int:
    """Return the bytes that each token of a context adds to the KV cache. A lower bound where layers differ in width.

    Args:
        config (Mapping): config.json.
        layers (int): Layers whose cache grows, see :func:`growing_layers`.
        itemsize (int): Bytes of an activation.
    """
    config = language_config(config)
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
