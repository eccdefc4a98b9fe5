"""Load a streamed model for a command, and finish its run."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from flashmoe_mlx.config import Config
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.model.load import load


def streamed_load(args: argparse.Namespace, config: Config) -> Callable[..., tuple[Any, ...]]:
    """Return ``load`` with a command line's settings: streaming, adapters and trust in remote code.

    Args:
        args (Namespace): Has ``adapter_path`` and ``trust_remote_code``.
        config (Config): How experts are streamed.

    Returns:
        Callable: Takes what :func:`flashmoe_mlx.load` takes, and returns the same.
    """

    def load_streamed(path: str, tokenizer_config: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
        trusted = {"trust_remote_code": args.trust_remote_code}
        options = {"adapter_path": args.adapter_path} | trusted | options
        loaded = load(path, tokenizer_config=(tokenizer_config or {}) | trusted, config=config, **options)
        if config.ram_budget == "auto":
            print(f"ram budget auto: {loaded[0].streaming.memory()}", file=sys.stderr)
        return loaded

    return load_streamed


def finish(streaming: Streaming, config: Config, verbose: bool = True) -> None:
    """Print the ``Experts:`` line unless the run is silent, and write the file for the next warm start.

    Args:
        streaming (Streaming): Of the model that has run.
        config (Config): Its settings.
        verbose (bool): Print the line. Default: ``True``.

    Raises:
        OSError: The file cannot be written.
    """
    if verbose:
        print(streaming.summary())
    if config.warm_start is not None:
        streaming.save_residents(config.warm_start)
