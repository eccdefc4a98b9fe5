"""Many requests, and long ones: no wrong token, and memory stays where it is."""

import gc
import random
from collections import Counter
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import psutil
import pytest
from mlx_lm.generate import generate_step

from flashmoe_mlx.config import Config
from flashmoe_mlx.generation.kv_cache import make_kv_cache
from flashmoe_mlx.streaming.read_error import ReadError
from tests.conftest import WriteFamily
from tests.support.faults import HARMFUL, HARMLESS, faults, hurried
from tests.support.oracle import resident, streamed

# Bytes that an allocator may keep or not.
PAGES = 40 << 20


@pytest.fixture(scope="module", autouse=True)
def tiny_pools() -> Iterator[None]:
    with hurried(6):
        yield


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.soak)])
def test_requests_of_random_length(count: int, checkpoint: WriteFamily) -> None:
    """One model, one request after the other, each with other faults; mlx-lm's own model gives the answers."""
    folder = checkpoint("qwen3_5_moe")
    model, oracle = streamed(folder, config=Config(read_timeout=0.3)), resident(folder)
    outcomes: Counter[str] = Counter()
    wrong, held = 0, []
    for seed in range(count):
        chance = random.Random(seed)
        prompt = mx.array([chance.randrange(320) for _ in range(chance.randint(1, 150))])
        tokens = chance.randint(1, 30)
        kind = chance.choice([*HARMLESS, *HARMFUL])
        said: list[int] = []
        with faults(kind, chance.choice([0.0003, 0.003, 0.03]), seed):
            try:
                said += (int(token) for token, _ in generate_step(prompt, model, max_tokens=tokens))
                outcomes["complete"] += 1
            except ReadError:
                assert kind in HARMFUL
                outcomes["error"] += 1
        right = [int(token) for token, _ in generate_step(prompt, oracle, max_tokens=tokens)]
        # Also in what an error cut off.
        wrong += sum(a != b for a, b in zip(said, right, strict=False))
        held.append(memory())
    half = np.array(held[count // 2 :]) / 1e3
    slope = np.polyfit(range(len(half)), half, 1)[0]
    print(f"{dict(outcomes)}, {wrong} wrong tokens, {slope:.1f} kB a request, {np.ptp(half):.0f} kB between extremes")
    assert wrong == 0
    assert slope * len(half) * 1e3 < PAGES


@pytest.mark.parametrize("tokens", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_long_generation(tokens: int, checkpoint: WriteFamily) -> None:
    """With a window as KV cache nothing may grow."""
    model = streamed(checkpoint("qwen3_5_moe"), 0.5)
    held = []
    steps = generate_step(mx.array([1, 2, 3]), model, max_tokens=tokens, prompt_cache=make_kv_cache(model, 128))
    for number, _ in enumerate(steps):
        if number % (tokens // 10) == 0:
            held.append(memory())
    print(f"{tokens} tokens: {(held[-1] - held[1]) / 1e6:+.2f} MB after the first tenth")
    assert held[-1] - held[1] < PAGES
