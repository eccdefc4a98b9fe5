"""Streaming changes nothing: the same bits as mlx-lm's own model, for every family, quantization and budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from flashmoe_mlx.config import SLOTS, Config
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.model import budget, swap
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import PROMPT, Run, assert_same, distance, resident, run, streamed

Expected = Callable[[Path], Run]

LONG_PROMPT = [(37 * i * i + 11 * i) % 320 for i in range(40)]


@pytest.mark.parametrize("fraction", [0, 0.25, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, fraction: float, checkpoint: WriteFamily, expected: Expected, monkeypatch: Any) -> None:
    # Fewer than these tiny models have, so that experts must leave.
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 16)
    folder = checkpoint(family)
    assert_same(run(streamed(folder, fraction)), expected(folder))


@pytest.mark.parametrize("fraction", [0, 0.25])
@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss", "nemotron_h", "llama4"])
def test_copied_slots(
    family: str, lookahead: bool, fraction: float, checkpoint: WriteFamily, expected: Expected, monkeypatch: Any
) -> None:
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 16)
    copies: list[int] = []
    planned: list[int] = []
    copy = BounceBuffers.copy
    monkeypatch.setattr(BounceBuffers, "copy", lambda self, *call: copies.append(call[0]) or copy(self, *call))
    monkeypatch.setattr(swap, "refuse_excess", lambda trunk, experts: planned.append(experts))
    folder = checkpoint(family)
    live = streamed(folder, fraction, config=Config(lookahead=lookahead))
    without_buffers = planned[-1]
    assert_same(run(live), expected(folder))
    assert not copies
    copied = streamed(folder, fraction, config=Config(slots="copied", lookahead=lookahead))
    assert_same(run(copied), expected(folder))
    assert copies
    # The buffers are a part of the plan for memory.
    assert planned[-1] == without_buffers + 32 * copied.streaming.pools[0].expert_nbytes


@pytest.mark.metal
@pytest.mark.parametrize("settings", [{"slots": "copied"}, {"keep_warm": "on"}], ids=str)
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_settings_that_do_not_change_the_output_of_a_gpu(
    family: str, settings: dict[str, Any], checkpoint: WriteFamily, on_gpu: Backend
) -> None:
    folder = checkpoint(family)
    wanted = run(streamed(folder, 0.25, config=Config(keep_warm="off")))
    assert_same(run(streamed(folder, 0.25, config=Config(**{"keep_warm": "off"} | settings))), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_experts_than_slots(family: str, checkpoint: WriteFamily, monkeypatch: Any) -> None:
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 5)
    folder = checkpoint(family)
    model, oracle = streamed(folder), resident(folder)
    batch = mx.array([LONG_PROMPT, LONG_PROMPT[::-1]])
    assert distance(model(batch), oracle(batch)) < 1e-5
    actual, wanted = run(model, LONG_PROMPT, 8), run(oracle, LONG_PROMPT, 8)
    assert actual.tokens == wanted.tokens
    assert distance(actual.logits, wanted.logits) < 1e-5


QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 64},
    "4 bits, group 32": {"bits": 4, "group_size": 32},
    "4 bits, group 128": {"bits": 4, "group_size": 128},
    "5 bits": {"bits": 5, "group_size": 32},
    "6 bits": {"bits": 6, "group_size": 64},
    "8 bits": {"bits": 8, "group_size": 128},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}


@pytest.mark.parametrize("fraction", [0, 0.25])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantization(quantization: str, fraction: float, checkpoint: WriteFamily, expected: Expected) -> None:
    folder = checkpoint("qwen3_moe", QUANTIZATIONS[quantization])
    assert_same(run(streamed(folder, fraction), tokens=16), truncate(expected(folder), 16))


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("fraction", [0, 0.25])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "gpt_oss", "nemotron_h"],
    # gpt_oss adds biases, nemotron_h two-part MLPs.
)
def test_half_precision_scales(
    family: str, dtype: mx.Dtype, fraction: float, slots: Any, checkpoint: WriteFamily, expected: Expected
) -> None:
    folder = checkpoint(family, {"bits": 4, "group_size": 64}, dtype=dtype)
    model = streamed(folder, fraction, config=Config(slots=slots))
    assert_same(run(model, tokens=16), truncate(expected(folder), 16))


@pytest.mark.parametrize("fraction", [0, 0.25, 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_unquantized(
    family: str, dtype: mx.Dtype, fraction: float, checkpoint: WriteFamily, expected: Expected
) -> None:
    folder = checkpoint(family, None, dtype=dtype)
    assert_same(run(streamed(folder, fraction), tokens=16), truncate(expected(folder), 16))


def bits_per_projection(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """A choice that mlx-lm saves per module: the experts' three matrices differ, and the routers stay as they are."""
    if path.endswith("gate"):
        return False
    bits = {"gate_proj": 3, "up_proj": 5, "down_proj": 8}.get(path.rpartition(".")[2])
    return {"bits": bits, "group_size": 32} if bits else True


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_mixed_bits(fraction: float, checkpoint: WriteFamily, expected: Expected) -> None:
    folder = checkpoint("qwen3_5_moe", {"bits": 4, "group_size": 64}, predicate=bits_per_projection)
    assert_same(run(streamed(folder, fraction)), expected(folder))


# Always takes one expert.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4"])
def test_fewer_experts_per_token(family: str, checkpoint: WriteFamily, monkeypatch: Any) -> None:
    folder = checkpoint(family)
    model = streamed(folder, experts_per_token=2)
    used: set[int] = set()
    call = StreamedSwitchGLU.__call__

    def note(self: StreamedSwitchGLU, x: mx.array, indices: mx.array, **overlap: Any) -> mx.array:
        used.add(indices.shape[-1])
        return call(self, x, indices, **overlap)

    monkeypatch.setattr(StreamedSwitchGLU, "__call__", note)
    actual = run(model, tokens=16)
    assert used == {2}
    assert_same(actual, run(resident(folder, **with_two_experts(FAMILIES[family])), tokens=16))
    assert "2 experts per token instead of 4" in model.streaming.summary()


def with_two_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config entries to replace."""
    if "text_config" in config:
        return {"text_config": config["text_config"] | with_two_experts(config["text_config"])}
    return {next(key for key in ("num_experts_per_tok", "top_k_experts") if key in config): 2}


def test_native_experts_per_token_is_not_mentioned(checkpoint: WriteFamily) -> None:
    model = streamed(checkpoint("qwen3_moe"), experts_per_token=4)
    model(mx.array([PROMPT]))
    assert "experts per token" not in model.streaming.summary()


def truncate(whole: Run, tokens: int) -> Run:
    """The same run, stopped earlier."""
    return Run(whole.logits, whole.tokens[:tokens], whole.logprobs[:tokens])
