"""Runs of models, compared token by token and logit by logit, and the oracle to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step

import flashmoe_mlx
from benchmarks.exact import load_resident
from flashmoe_mlx.model import load as load_module
from flashmoe_mlx.ops.dispatch import Backend

PROMPT: list[int] = [(37 * i * i + 11) % 320 for i in range(20)]
"""Long enough to route to most experts of a layer at once."""


class Run(NamedTuple):
    """The logits of every position of a prompt, then greedy tokens with the log-probabilities that chose them."""

    logits: mx.array
    tokens: list[int]
    logprobs: mx.array


EACH_BACKEND = pytest.mark.parametrize(
    "backend", [Backend.NATIVE, Backend.REFERENCE], ids=["native", "reference"], indirect=True
)
"""Runs a test on the native kernels, which are the product's choice on a CPU, and on MLX operations."""


def mlx_lm_model(folder: Path, **config: Any) -> nn.Module:
    """Load a model as mlx-lm does, in the precision that streaming computes in."""
    return load_resident(str(folder), **config)


def resident(folder: Path, **config: Any) -> nn.Module:
    """Load the oracle: on MLX operations mlx-lm's own model, on kernels ours with all experts in memory.

    Kernels accumulate in another order than MLX, so only the former has the same bits as mlx-lm.
    """
    if load_module.choose_backend() is Backend.REFERENCE:
        return mlx_lm_model(folder, **config)
    model, _ = flashmoe_mlx.load(str(folder), ram_budget="1GB", model_config=config)
    assert model.streaming.slots_nbytes == model.streaming.experts_nbytes
    return model


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
