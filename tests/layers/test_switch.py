"""No slot is overwritten while something still has to read it, in whatever order calls are built and evaluated."""

import time
from collections.abc import Iterator
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.config import Config
from flashmoe_mlx.layers import switch as layers
from flashmoe_mlx.layers.expert_mlp import ExpertMLP
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.model import budget
from flashmoe_mlx.ops.native import Kernels
from flashmoe_mlx.streaming import reader
from flashmoe_mlx.streaming.reader import Reader
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import PROMPT, assert_same, resident, run, streamed

OTHER_PROMPT = [(7 * i + 3) % 320 for i in range(17)]


@pytest.fixture(scope="module", params=["qwen3_5_moe", "deepseek_v3", "gpt_oss"])
def models(request: pytest.FixtureRequest, checkpoint: WriteFamily) -> tuple[nn.Module, nn.Module]:
    """A streamed model with hardly any slots, and a resident one."""
    folder = checkpoint(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_SHARED_SLOTS", 5)
        return streamed(folder), resident(folder)


def test_lazy_calls_are_right_in_any_order(models: tuple[nn.Module, nn.Module]) -> None:
    model, oracle = models
    inputs = [mx.array([prompt]) for prompt in ([3], [200], PROMPT, [11], OTHER_PROMPT)]
    # Nothing has been evaluated yet.
    outputs = [model(each) for each in inputs]
    for each, output in reversed(list(zip(inputs, outputs, strict=True))):
        assert mx.array_equal(output, oracle(each))


def test_a_call_may_never_be_evaluated(models: tuple[nn.Module, nn.Module]) -> None:
    model, oracle = models
    model(mx.array([OTHER_PROMPT]))
    assert mx.array_equal(model(mx.array([PROMPT])), oracle(mx.array([PROMPT])))


def test_slots_wait_for_slow_computation(models: tuple[nn.Module, nn.Module]) -> None:
    """A call whose slots are still to be read does not lose them to the next one, which waits for no input."""
    model, oracle = models
    path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, StreamedSwitchGLU))
    switch = dict(oracle.named_modules())[path]
    slow = mx.random.normal((512, 512), key=mx.random.key(0))
    mx.eval(slow)
    for _ in range(3):
        slow = mx.softmax(slow @ slow)
    hidden = mx.random.normal((1, 128), key=mx.random.key(1)) + slow[:1, :128]
    calls = [(hidden * scale, mx.array([experts])) for scale, experts in ((1, [0, 1, 2, 3]), (2, [4, 5, 6, 7]))]
    outputs = [layer(x, indices) for x, indices in calls]
    for output, (x, indices) in zip(outputs, calls, strict=True):
        assert mx.array_equal(output, switch(x, indices))


def test_generations_may_interleave(models: tuple[nn.Module, nn.Module]) -> None:
    def steps(model: nn.Module, prompt: list[int]) -> Iterator[tuple[int, mx.array]]:
        return generate_step(mx.array(prompt), model, max_tokens=16, prompt_cache=make_prompt_cache(model))

    model, oracle = models
    pairs = list(zip(steps(model, PROMPT), steps(model, OTHER_PROMPT), strict=True))
    for prompt, actual in zip((PROMPT, OTHER_PROMPT), zip(*pairs, strict=True), strict=True):
        for (token, logprobs), (wanted_token, wanted) in zip(actual, steps(oracle, prompt), strict=True):
            assert token == wanted_token
            assert mx.array_equal(logprobs, wanted)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("threads", [1, 16])
# A token's experts exactly, and a few more.
@pytest.mark.parametrize("slots", [4, 7])
def test_late_reads_change_nothing(
    lookahead: bool, threads: int, slots: int, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end in any order, while mlx-lm decodes a token ahead."""
    random = Random(slots)
    read = Reader._copy

    def slow_read(self: Reader, *args: Any) -> None:
        time.sleep(random.random() * 1e-3)
        read(self, *args)

    # So that threads share even these small reads.
    monkeypatch.setattr(reader, "_LARGE_NBYTES", 1)
    monkeypatch.setattr(Reader, "_copy", slow_read)
    monkeypatch.setattr(budget, "_SHARED_SLOTS", slots)
    folder = checkpoint("qwen3_5_moe")
    model = streamed(folder, config=Config(read_threads=threads, lookahead=lookahead))
    assert_same(run(model, tokens=8), run(resident(folder), tokens=8))
    assert (model.streaming.counters.lookahead_used > 0) == (lookahead and slots > 4)


@pytest.mark.parametrize("fraction", [0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_lookahead_changes_nothing(
    family: str, fraction: float, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 12)
    folder = checkpoint(family)
    model = streamed(folder, fraction, config=Config(lookahead=True))
    assert_same(run(model, tokens=8), run(resident(folder), tokens=8))
    counters = model.streaming.counters
    assert any(layer._lookahead for layer in model.modules() if isinstance(layer, StreamedSwitchGLU)) == (
        counters.lookahead_used + counters.lookahead_wasted > 0
    )


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_pool_may_hold_less_than_a_token_needs(
    slots: int, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_SHARED_SLOTS", slots)
    folder = checkpoint("qwen3_moe")
    assert_same(run(streamed(folder), tokens=8), run(resident(folder), tokens=8))


@pytest.mark.parametrize("shares_cores", [False, True])
@pytest.mark.parametrize("fraction", [0, 0.25, 0.6])
@pytest.mark.parametrize("slots", [3, 5, 12])
def test_launching_resident_experts_early_changes_no_bit(
    slots: int,
    fraction: float,
    shares_cores: bool,
    native: Kernels,
    checkpoint: WriteFamily,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU launches them at every decode step, a CPU only after a step without misses."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", slots)
    launched: list[mx.array | None] = []
    resident_output = ExpertMLP.resident
    monkeypatch.setattr(ExpertMLP, "resident", lambda *args: launched.append(resident_output(*args)) or launched[-1])
    folder = checkpoint("qwen3_5_moe")
    wanted = run(streamed(folder, 1))
    model = streamed(folder, fraction)
    layers = [layer for layer in model.modules() if isinstance(layer, StreamedSwitchGLU)]
    for layer in layers:
        layer._shares_cores = shares_cores
    assert_same(run(model), wanted)
    assert all(y is not None for y in launched)
    assert (len(launched) >= 32 * len(layers)) != shares_cores


def test_hits_launch_nothing_after_the_sync(
    native: Kernels, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_5_moe")
    wanted = run(streamed(folder, 1))
    monkeypatch.setattr(budget.PoolPlan, "all_resident", False)
    model = streamed(folder, 1)
    run(model)
    misses = model.streaming.counters.misses
    launched: list[str] = []
    launch = layers._launch
    monkeypatch.setattr(layers, "_launch", lambda *args: launched.append("late") or launch(*args))
    assert_same(run(model), wanted)
    assert model.streaming.counters.misses == misses
    # Those of the two prompts.
    assert len(launched) == sum(isinstance(m, StreamedSwitchGLU) for m in model.modules()) * 2


@pytest.mark.parametrize("fraction", [0, 0.5])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3", "gpt_oss"])
def test_prefetched_experts_are_computed_too(
    family: str, fraction: float, native: Kernels, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a layer without a lookahead of its own."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 12)
    folder = checkpoint(family)
    model = streamed(folder, fraction, config=Config(lookahead=True))
    assert_same(run(model), run(streamed(folder, 1)))
    assert model.streaming.counters.lookahead_used > 0


def test_a_call_of_no_tokens_is_empty(checkpoint: WriteFamily) -> None:
    model = streamed(checkpoint("qwen3_5_moe"))
    layer = next(m for m in model.modules() if isinstance(m, StreamedSwitchGLU))
    y = layer(mx.zeros((1, 0, layer.hidden)), mx.zeros((1, 0, 4), mx.uint32))
    assert y.shape == (1, 0, 4, layer.hidden)
