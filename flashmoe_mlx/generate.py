"""Generate text with streamed experts: mlx_lm.generate, every flag of it, and ours.

python -m flashmoe_mlx.generate --model FOLDER_OR_REPO --prompt "What is a heron?"
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import mlx_lm

from flashmoe_mlx.checkpoint import find_folder, read_config
from flashmoe_mlx.command import extend_parser, one_line_errors
from flashmoe_mlx.config import Config
from flashmoe_mlx.model import load
from flashmoe_mlx.progress import PromptProgress

EPILOG = """examples:
  python -m flashmoe_mlx.generate --model mlx-community/Qwen3.5-397B-A17B-4bit --prompt "What is a heron?"
  python -m flashmoe_mlx.generate --model ./model --ram-budget 12GB --config exact --prompt - < question.txt
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.generate's parser with the flags of expert streaming."""
    description = "Generate text with a Mixture-of-Experts model whose experts stay on disk."
    return extend_parser(_mlx_generate().setup_arg_parser(), description, EPILOG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _generate(setup_arg_parser(), argv)


def _generate(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """mlx_lm.generate's own main(), with our parser and our load()."""
    args = parser.parse_args(argv)
    if args.model is None and (args.config or not args.prompt_cache_file):
        raise ValueError("--model is missing: give a model folder or a Hugging Face repo")
    config = Config()
    if args.config is not None:
        config = Config.load(args.config, read_config(find_folder(args.model))["model_type"])
        parser.set_defaults(**config.sampling)
        args = parser.parse_args(argv)
    config = config.override(
        ram_budget=args.ram_budget, experts_per_token=args.experts_per_token, read_threads=args.read_threads
    )
    streamed = []

    def load_streamed(path: str, **options: Any) -> tuple[Any, ...]:
        if path == args.draft_model:
            return tuple(mlx_lm.load(path, **options))  # small, and rarely a Mixture of Experts
        loaded = load(path, config=config, **options)
        streamed.append(loaded[0].streaming)
        if config.ram_budget == "auto":
            print(f"ram budget auto: {streamed[-1].memory()}", file=sys.stderr)
        return loaded

    parsed = SimpleNamespace(parse_args=lambda: args)
    generate = partial(mlx_lm.generate, prompt_progress_callback=PromptProgress())
    with mock.patch.multiple(_mlx_generate(), setup_arg_parser=lambda: parsed, load=load_streamed, generate=generate):
        _mlx_generate().main()
    if args.verbose:
        print(streamed[0].summary())


def _mlx_generate() -> ModuleType:
    # As an attribute, mlx_lm.generate is the function.
    return importlib.import_module("mlx_lm.generate")


if __name__ == "__main__":
    main()
