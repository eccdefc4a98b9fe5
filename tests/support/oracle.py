"""What is compared: tokens and every logit of a run, and mlx-lm's own model to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

import flashmoe_mlx
from benchmarks.exact import load_resident

PROMPT: list[int] = [(37 * i * i + 11) % 320 for i in range(20)]
"""Long enough to route to most experts of a layer at once."""


class Run(NamedTuple):
    """The logits of every position of a prompt, then greedy tokens with the log-probabilities that chose them."""

    logits: mx.array
    tokens: list[int]
    logprobs: mx.array


def resident(folder: Path, **config: Any) -> nn.Module:
    """The oracle: the model that mlx-lm itself loads, in the precision that streaming computes in."""
    return load_resident(str(folder), **config)


def streamed(folder: Path, fraction: float = 0, **options: Any) -> nn.Module:
    """Our model with memory for a fraction of its experts."""
    if fraction:
        options["ram_budget"] = int(streamed(folder).streaming.experts_nbytes * fraction)
    model, _ = flashmoe_mlx.load(str(folder), **options)
    return model


def run(model: nn.Module, prompt: Sequence[int] = PROMPT, tokens: int = 32) -> Run:
    """Prefill a prompt in one call, then generate greedily with mlx-lm's own loop."""
    logits = model(mx.array([prompt]))
    mx.eval(logits)
    steps = list(generate_step(mx.array(prompt), model, max_tokens=tokens, logits_processors=[_forbid_repeats]))
    return Run(logits, [int(token) for token, _ in steps], mx.stack([logprobs for _, logprobs in steps]))


def _forbid_repeats(tokens: mx.array, logits: mx.array) -> mx.array:
    """Random weights like to repeat one token for ever, which would need the same few experts for ever."""
    return mx.put_along_axis(logits, tokens[None], mx.array(-mx.inf, logits.dtype), axis=-1)


def assert_same(actual: Run, expected: Run) -> None:
    """Require the same bits."""
    assert actual.tokens == expected.tokens
    assert mx.array_equal(actual.logits, expected.logits)
    assert mx.array_equal(actual.logprobs, expected.logprobs)


def distance(actual: mx.array, expected: mx.array) -> float:
    """The largest relative error of a position's logits, by norm."""
    error = mx.linalg.norm(actual - expected, axis=-1) / mx.linalg.norm(expected, axis=-1)
    return float(error.max().item())
