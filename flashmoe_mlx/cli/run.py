"""Load a streamed model for a command, and end its run."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import mlx_lm

from flashmoe_mlx.config import Config
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.model.load import load


def streamed_load(args: argparse.Namespace, config: Config) -> Callable[..., tuple[Any, ...]]:
    """What takes the place of ``load`` in one of mlx-lm's commands: ours, except for a draft model."""

    def load_streamed(path: str, **options: Any) -> tuple[Any, ...]:
        if path == getattr(args, "draft_model", None):
            return tuple(mlx_lm.load(path, **options))  # small, and rarely a Mixture of Experts
        loaded = load(path, config=config, **options)
        if config.ram_budget == "auto":
            print(f"ram budget auto: {loaded[0].streaming.memory()}", file=sys.stderr)
        return loaded

    return load_streamed


def finish(streaming: Streaming, config: Config, verbose: bool = True) -> None:
    """What every run ends with: the ``Experts:`` line unless it is to be silent, and the file for the next warm start.

    Raises:
        OSError: that file cannot be written.
    """
    if verbose:
        print(streaming.summary())
    if config.warm_start is not None:
        streaming.save_residents(config.warm_start)
