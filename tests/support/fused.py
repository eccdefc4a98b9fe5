"""Models with and without fused decode steps, and what both compute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe_mlx.layers.qwen3_next import fuse_decoder_layers
from flashmoe_mlx.ops.dispatch import Backend
from tests.support.oracle import mlx_lm_model


def plain_and_fused(folder: Path, backend: Backend) -> tuple[nn.Module, nn.Module]:
    """Load mlx-lm's model twice, and fuse the decode steps of the second."""
    plain, fused = mlx_lm_model(folder), mlx_lm_model(folder)
    assert fuse_decoder_layers(fused, backend) == len(fused.layers)
    return plain, fused


def steps(model: nn.Module, cache: list[Any], lengths: list[int]) -> Iterator[mx.array]:
    """Yield the logits of steps of these many tokens."""
    position = 0
    for length in lengths:
        yield model(mx.array([[(7 * i + 3) % 300 for i in range(position, position + length)]]), cache=cache)
        position += length


def arrays(cache: list[Any]) -> list[mx.array]:
    """Return the states of a cache."""
    return [array for _, array in tree_flatten([each.state for each in cache]) if isinstance(array, mx.array)]
