"""Bytes of a KV cache, and the context that memory can hold."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from flashmoe_mlx.model import context
from flashmoe_mlx.model.context import kv_token_nbytes, quantized_share
from flashmoe_mlx.model.prefill import ChunkMemory
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import streamed


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bytes_per_token_are_those_of_the_cache(family: str, checkpoint: WriteFamily) -> None:
    """Or half of them, in a family some of whose layers are wider."""
    model = streamed(checkpoint(family))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[3]]), cache=cache))
    actual = sum(each.nbytes for each in cache if type(each) is KVCache) / KVCache.step
    assert model.streaming.kv_token_nbytes == actual / (2 if family == "gemma4_text" else 1) > 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32)])
def test_quantized_share_is_that_of_the_cache(dtype: mx.Dtype, bits: int, group_size: int) -> None:
    plain, quantized = KVCache(), QuantizedKVCache(group_size, bits)
    for cache in (plain, quantized):
        cache.update_and_fetch(*(mx.zeros((1, 2, 1, 128), dtype) for _ in range(2)))
    assert quantized.nbytes == plain.nbytes * quantized_share(bits, group_size, dtype.size)


def test_context_above_available_memory_is_refused(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = streamed(checkpoint("qwen3_moe")).streaming
    assert streaming.kv_token_nbytes == kv_token_nbytes(FAMILIES["qwen3_moe"], 2, 4) == 1024
    # Attention scores are another matter.
    streaming = replace(streaming, chunk_memory=ChunkMemory(0, heads=0, itemsize=4))
    monkeypatch.setattr(context, "available_memory", lambda: 10**9)
    streaming.refuse_context(900_000)
    # 8 bits of 32, and a scale and a bias for 64 values.
    streaming.refuse_context(3_000_000, kv_bits=8)
    with pytest.raises(MemoryError, match=r"of 3,500,000 tokens needs 1.01 GB"):
        streaming.refuse_context(3_500_000, kv_bits=8)
    streaming.refuse_context(3_500_000, kv_bits=8, kv_group_size=128)
    with pytest.raises(MemoryError, match=r"of 1,000,000 tokens needs 1.02 GB, and 1.00 GB are free: shorten"):
        streaming.refuse_context(1_000_000)
