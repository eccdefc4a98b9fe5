"""Load a streamed model for a command, sample as its command line says, and finish its run."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.config import Config
from flashmoe_mlx.generation.sampling import xtc_special_tokens
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


def kv_cache_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return a command line's settings of the KV cache, under mlx-lm's names."""
    return {name: getattr(args, name) for name in ("kv_bits", "kv_group_size", "quantized_kv_start")}


def sampler_of(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, min_tokens_to_keep: int = 1
) -> Callable[[mx.array], mx.array]:
    """Return mlx-lm's sampler with a command line's settings.

    Args:
        args (Namespace): Has ``temp``, ``top_p``, ``min_p``, ``top_k``, ``xtc_probability`` and ``xtc_threshold``.
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
        min_tokens_to_keep (int): Tokens that min-p sampling leaves at least. Default: ``1``.

    Returns:
        Callable: Takes log probabilities ``[batch, vocabulary]``, and returns tokens ``[batch]``.
    """
    sampler: Callable[[mx.array], mx.array] = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=xtc_special_tokens(tokenizer),
    )
    return sampler


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
