"""Prefill chunks are as large as memory allows, and become smaller as the context grows."""

from math import log2
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import flashmoe_mlx
from benchmarks.checkpoints import write_checkpoint
from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.kv_cache import make_kv_cache
from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.model import budget, context, info, prefill, swap
from flashmoe_mlx.model.prefill import ChunkMemory, PrefillPlan, fewest_tokens
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import resident, streamed

GB = 10**9
SIZES = {"top_k": 10, "hidden": 4096, "intermediate": 1024, "itemsize": 2, "sinks": False}
QWEN_397B = {
    "text_config": {
        "num_attention_heads": 32,
        "head_dim": 256,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
}


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "computes_on_metal", lambda: True)
    monkeypatch.setattr(prefill, "has_neural_accelerators", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


@pytest.mark.parametrize("free", [-1, 0, 10**8, 10**9, 10**10, 10**12])
def test_chunks_take_a_quarter_of_the_free_memory(free: int) -> None:
    memory = ChunkMemory(250_000, heads=32, itemsize=2)
    step = memory.most_tokens(free)
    assert log2(step).is_integer()
    assert step == 512 or memory.nbytes(step, step) <= free / 4
    assert step == 8192 or memory.nbytes(2 * step, 2 * step) > free / 4
    assert 512 <= step <= 8192


def test_large_model_on_a_mac(metal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5-397B-A17B in bfloat16: 10 * (4 * 4096 + 3 * 1024) + 16 * 4096 values a token, 32 scores of 2 bytes."""
    memory = ChunkMemory.from_config(QWEN_397B, **SIZES)
    assert memory == ChunkMemory(2 * (194_560 + 65_536), 32, 2)
    assert memory.scores_nbytes(512, 131_072) == 32 * 512 * 131_072 * 2
    assert [memory.most_tokens(free * GB) for free in (2, 8, 14, 35, 100)] == [512, 2048, 4096, 8192, 8192]
    # A Mac that computes on its CPU keeps the GatedDeltaNet state of each token.
    monkeypatch.setattr(prefill, "computes_on_metal", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    elsewhere = ChunkMemory.from_config(QWEN_397B, **SIZES)
    assert elsewhere.token_nbytes - memory.token_nbytes == 2 * 64 * 128 * 128


@pytest.mark.parametrize(
    ("config", "accelerators", "fused_tokens"),
    [
        ({"head_dim": 128}, False, 0),
        ({"head_dim": 64}, False, 0),
        ({"head_dim": 256}, False, None),
        ({"head_dim": 192}, True, None),
        ({"head_dim": 256}, True, 1024),
        ({"head_dim": 128, "kv_lora_rank": 512}, False, None),
        # 4096 / 32.
        ({}, False, 0),
    ],
)
def test_attention_that_metal_fuses_keeps_no_scores(
    config: dict[str, Any], accelerators: bool, fused_tokens: int | None, metal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "has_neural_accelerators", lambda: accelerators)
    memory = ChunkMemory.from_config({"num_attention_heads": 32, **config}, **SIZES)
    assert memory.fused_tokens == fused_tokens
    assert (memory.scores_nbytes(1024, 10**5) == 0) == (fused_tokens is not None)
    assert (memory.scores_nbytes(512, 10**5) == 0) == (fused_tokens == 0)
    # mlx-lm attends to a quantized cache with products of its own.
    assert memory.scores_nbytes(1024, 10**5, quantized=True) == 32 * 1024 * 10**5 * 2
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert ChunkMemory.from_config({"num_attention_heads": 32, **config}, **SIZES).fused_tokens is None


def plan(free: float, most: int = 4096, **options: Any) -> PrefillPlan:
    """Chunks of the 397B model on M1 to M4, where a score of every head takes 64 bytes."""
    memory = ChunkMemory(520_192, 32, 2)
    options = {"asked": False, "buffer": 28 * GB} | options
    return PrefillPlan(131_072, memory, most, free=int(free * GB), **options)


def test_chunks_shrink_as_the_context_grows() -> None:
    """48 GB at budget 0: 28 GB are free, and a chunk may take 7 of them, or 14 if it has no more than 512 tokens."""
    chunks = plan(28)
    assert [chunks.chunk(start) for start in (0, 8192, 32_768, 65_536, 131_072)] == [4096, 4096, 2048, 1024, 512]
    for start in range(0, 131_072, 4096):
        tokens = chunks.chunk(start)
        assert chunks.memory.nbytes(tokens, start + tokens) <= 7 * GB
    assert chunks.step_size == 512
    # At budget 20GB.
    assert plan(4, 1024).step_size == 128


def test_no_array_is_larger_than_a_buffer() -> None:
    """Also where memory would allow it: 64 bytes * tokens * context."""
    assert plan(400).chunk(131_072) == 4096 // 2
    assert plan(400, buffer=10**18).chunk(131_072) == 4096
    assert plan(400, buffer=2 * GB).chunk(131_072) == 128
    assert plan(400, 5000, asked=True).chunk(131_072) == 2500


def test_what_was_asked_for_may_take_half() -> None:
    assert plan(28, 1000, asked=True).chunk(131_072) == 1000
    assert plan(14, 1000, asked=True).chunk(131_072) == 500
    assert plan(0, 1000, asked=True).chunk(131_072) == 62
    assert plan(0, 8, asked=True).chunk(131_072) == 8
    assert plan(0).chunk(131_072) == 64


def test_a_window_bounds_the_context() -> None:
    assert plan(28, window=4096).chunk(131_072) == 4096
    assert plan(28, window=4096).context(512, 131_072) == 4608


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe", "gpt_oss"])
def test_upper_bound(checkpoint: WriteFamily, family: str) -> None:
    """MLX allocates no more for a chunk than estimated, and not much less."""
    model, tokens = resident(checkpoint(family)), 512
    cache_and_weights = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = mx.array([(37 * i * i + 11) % 320 for i in range(tokens + 1)])
    list(generate_step(prompt, model, max_tokens=0, prefill_step_size=tokens))
    used = mx.get_peak_memory() - cache_and_weights
    sizes = {"top_k": 4, "hidden": 128, "intermediate": 256, "itemsize": 4}
    memory = ChunkMemory.from_config(FAMILIES[family], **sizes, sinks=family == "gpt_oss")
    assert used < memory.nbytes(tokens, tokens) < 20 * used


def test_streaming_tells(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen3_moe")
    streaming = streamed(folder).streaming
    held = streaming.trunk_nbytes + streaming.slots_nbytes
    assert streaming.chunk_memory.copies == 1
    assert streamed(checkpoint("gpt_oss")).streaming.chunk_memory.copies == 4
    needed = 4 * streaming.chunk_memory.nbytes(2048, 2048)
    monkeypatch.setattr(budget, "available_memory", lambda: held + needed)
    monkeypatch.setattr(swap, "available_memory", budget.available_memory)
    assert streamed(folder).streaming.prefill_step_size == 2048
    monkeypatch.setattr(swap, "available_memory", lambda: held + needed - 4)
    assert streamed(folder).streaming.prefill_step_size == 1024


def test_plan_of_a_prompt_leaves_room_for_its_kv_cache(
    checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024 bytes a token in two layers, one of which is copied when it grows."""
    streaming = streamed(checkpoint("qwen3_moe")).streaming
    assert streaming.kv_layers == 2
    monkeypatch.setattr(info, "available_memory", lambda: 10**9)
    monkeypatch.setattr(info, "memory_reserve", lambda: 1000)
    assert streaming.plan_prefill(1000).free == 10**9 - (1000 + 500) * 1024
    assert streaming.plan_prefill(1000, cached=400).free == 10**9 - (600 + 500) * 1024
    assert streaming.plan_prefill(1000, window=100).free == 10**9 - (100 + 50) * 1024
    assert streaming.plan_prefill(1000, cached=400, window=100).free == 10**9 - 50 * 1024
    # 8 bits of 32, and a scale and a bias for 64 values.
    quantized = streaming.plan_prefill(1000, kv_bits=8)
    assert quantized.quantized and quantized.free == 10**9 - 288 * 1500
    # A full machine has room for a few scores.
    assert streaming.plan_prefill(10**7).free == 1000
    asked = streaming.plan_prefill(1000, step_size=96)
    assert (asked.most, asked.asked, asked.buffer) == (96, True, info.max_buffer_nbytes())
    assert streaming.plan_prefill(1000).most == streaming.prefill_step_size


def test_context_whose_scores_do_not_fit_is_refused(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, 4 heads and 4 bytes a score, besides 1,024 bytes a token of the KV cache."""
    streaming = streamed(checkpoint("qwen3_moe")).streaming
    monkeypatch.setattr(context, "available_memory", lambda: 2048 * 10**5)
    streaming.refuse_context(10**5)
    with pytest.raises(MemoryError, match=r"needs 0.20 GB with 0.10 GB of attention scores, and 0.20 GB are free"):
        streaming.refuse_context(10**5 + 1)
    monkeypatch.setattr(context, "max_buffer_nbytes", lambda: 1024 * 10**5 - 1)
    with pytest.raises(MemoryError, match=r"scores of 100,000 tokens need an array of 0.10 GB, and the GPU allows"):
        streaming.refuse_context(10**5)
    assert fewest_tokens(10) == 10


@pytest.mark.parametrize(
    ("cached", "tokens", "room", "size"),
    [(8000, 700, 110e6, 256), pytest.param(98_304, 1696, 840e6, 128, marks=pytest.mark.soak)],
    ids=["8,700 tokens", "100,000 tokens"],
)
def test_peak_memory_of_a_prompt_is_the_planned_one(
    cached: int, tokens: int, room: float, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a long prompt with heads of 256: KV cache, the copy of a layer's, and a chunk, within 15%."""
    write_checkpoint(tmp_path, FAMILIES["qwen3_moe"] | {"head_dim": 256}, quantization={"group_size": 64, "bits": 4})
    model, tokenizer = flashmoe_mlx.load(str(tmp_path))
    streaming, processed = model.streaming, []
    before = mx.get_active_memory()
    state = make_kv_cache(model)
    for layer in state:
        layer.update_and_fetch(*(mx.random.normal((1, 2, cached, 256)) for _ in range(2)))
    mx.eval([layer.state for layer in state])
    kv_nbytes = (cached + tokens) * streaming.kv_token_nbytes
    free = int(room + kv_nbytes)
    monkeypatch.setattr(info, "available_memory", lambda: free - cached * streaming.kv_token_nbytes)
    monkeypatch.setattr(info, "memory_reserve", lambda: 0)
    monkeypatch.setattr(PrefixCache, "nearest", lambda *_: (state, cached))
    mx.reset_peak_memory()
    Generator(model, tokenizer, PrefixCache()).prefill(
        [1] * (cached + tokens + 1), {}, progress=lambda done, _: processed.append(done)
    )
    used = mx.get_peak_memory() - before
    assert processed[1] == size
    chunk = streaming.chunk_memory.nbytes(size, cached + tokens)
    planned = kv_nbytes * (1 + 1 / streaming.kv_layers) + chunk
    print(
        f"chunks of {size} tokens, {planned / 1e6:.1f} MB planned, {used / 1e6:.1f} MB used, {free / 1e6:.1f} MB free"
    )
    assert 0.85 < used / planned < 1.15
    assert used < free
