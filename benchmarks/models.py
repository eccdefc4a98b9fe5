"""Models as benchmarks need them: where their experts lie, and streamed with every expert a hit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.nn as nn

import flashmoe_mlx
from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.model.budget import PoolPlan
from flashmoe_mlx.model.families import find_experts
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.model.load import load_lazily
from flashmoe_mlx.ops.dispatch import choose_backend


def sizes(model: str) -> Streaming:
    """Return the sizes of a model without reading its weights."""
    streaming: Streaming = flashmoe_mlx.load(model, lazy=True)[0].streaming
    return streaming


def expert_tables(model: str) -> list[ExpertTable]:
    """Return the expert table of each layer, in order."""
    checkpoint = Checkpoint(find_folder(model))
    return find_experts(load_lazily(checkpoint, {}, False)[0], checkpoint, choose_backend())[1]


def checkpoint_files(model: str) -> list[Path]:
    """Return the safetensors files of a model."""
    return [Path(file) for file in Checkpoint(find_folder(model)).files]


def load_all_hits(model: str, **options: Any) -> nn.Module:
    """Load a model that streams as at any budget, host syncs included, and has every expert in a slot.

    A budget of all experts alone would replace the streaming layers by resident ones, which need no sync.
    """
    tables = expert_tables(model)
    with mock.patch.object(PoolPlan, "all_resident", False):
        loaded = flashmoe_mlx.load(model, ram_budget=sizes(model).experts_nbytes, **options)[0]
    fill(loaded, tables)
    return loaded


def fill(model: nn.Module, tables: Sequence[ExpertTable]) -> None:
    """Read the first experts of each layer into the slots of its pool, which is full after a while anyway."""
    pools = model.streaming.pools
    # A pool of its own for each layer; a shared one is full after a token.
    if len(pools) == len(tables):
        for table, pool in zip(tables, pools, strict=True):
            pool.load(table, range(pool.slots))
