"""Prefill chunks are as large as memory allows, and no larger."""

from math import log2

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from flashmoe_mlx.model import budget, swap
from flashmoe_mlx.model.context import prefill_step_size, prefill_token_nbytes
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import resident, streamed

QWEN_397B = {
    "text_config": {
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
}


@pytest.mark.parametrize("free", [-1, 0, 10**8, 10**9, 10**10, 10**12])
def test_chunks_take_a_quarter_of_the_free_memory(free: int) -> None:
    token = 250_000
    step = prefill_step_size(free, token)
    assert log2(step).is_integer()
    assert step == 512 or (step * token <= free / 4 and (step == 8192 or 2 * step * token > free / 4))
    assert 512 <= step <= 8192


def test_large_model_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5-397B-A17B in bfloat16: 10 * (4 * 4096 + 3 * 1024) + 16 * 4096 + 2 * 32 * 8192 values a token."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    token = prefill_token_nbytes(QWEN_397B, top_k=10, hidden=4096, intermediate=1024, itemsize=2)
    assert token == 2 * (194_560 + 65_536 + 524_288)
    assert [prefill_step_size(free * 10**9, token) for free in (2, 14, 35, 100)] == [512, 2048, 4096, 8192]
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    elsewhere = prefill_token_nbytes(QWEN_397B, top_k=10, hidden=4096, intermediate=1024, itemsize=2)
    assert elsewhere - token == 2 * 64 * 128 * 128


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe", "gpt_oss"])
def test_upper_bound(checkpoint: WriteFamily, family: str) -> None:
    """MLX allocates no more for a chunk than estimated, and not much less."""
    model, tokens = resident(checkpoint(family)), 512
    cache_and_weights = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = mx.array([(37 * i * i + 11) % 320 for i in range(tokens + 1)])
    list(generate_step(prompt, model, max_tokens=0, prefill_step_size=tokens))
    used = (mx.get_peak_memory() - cache_and_weights) / tokens
    estimated = prefill_token_nbytes(FAMILIES[family], top_k=4, hidden=128, intermediate=256, itemsize=4)
    assert used < estimated < 20 * used


def test_streaming_tells(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen3_moe")
    token = prefill_token_nbytes(FAMILIES["qwen3_moe"], top_k=4, hidden=128, intermediate=256, itemsize=4)
    streaming = streamed(folder).streaming
    held = streaming.trunk_nbytes + streaming.slots_nbytes
    monkeypatch.setattr(budget, "available_memory", lambda: held + 4 * 2048 * token)
    monkeypatch.setattr(swap, "available_memory", budget.available_memory)
    assert streamed(folder).streaming.prefill_step_size == 2048
    monkeypatch.setattr(swap, "available_memory", lambda: held + 4 * 2048 * token - 4)
    assert streamed(folder).streaming.prefill_step_size == 1024
