"""Save the state after a prompt, so that it is read once for many questions: mlx_lm.cache_prompt, and our flags.

python -m flashmoe_mlx.cache_prompt --model FOLDER_OR_REPO --prompt "What we know of herons:" --prompt-cache-file herons
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.nn as nn
from mlx_lm import cache_prompt as mlx_cache_prompt
from mlx_lm.generate import generate_step

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, streamed_load
from flashmoe_mlx.generation.prompt_cache import cache_path, cache_settings, save_prompt_cache

EPILOG = """examples:
  python -m flashmoe_mlx.cache_prompt --model ./model --prompt - --prompt-cache-file manual.safetensors < manual.txt
  python -m flashmoe_mlx.generate --prompt-cache-file manual.safetensors --prompt "What is a heron?"
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.cache_prompt's parser with the flags of expert streaming."""
    description = "Save the state after a prompt to a file that flashmoe_mlx.generate continues from."
    return extend_parser(mlx_cache_prompt.setup_arg_parser(), description, EPILOG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _cache_prompt(setup_arg_parser(), argv)


def _cache_prompt(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """mlx_lm.cache_prompt's own main(), with our parser, our load() and a file that is whole or not there."""
    args, config = parse_arguments(parser, argv)
    path = cache_path(args.prompt_cache_file)
    if not os.access(path.parent, os.W_OK) or path.is_dir():  # better now than after a long prompt
        raise OSError(f"cannot write {path}: its folder is missing or read-only, or it is a folder itself")
    models: list[nn.Module] = []

    def read_prompt(prompt: Any, model: nn.Module, **options: Any) -> Iterator[Any]:
        models.append(model)
        model.streaming.refuse_context(
            min(len(prompt), args.max_kv_size or len(prompt)), args.kv_bits, args.kv_group_size
        )
        options["prompt_progress_callback"] = PromptProgress()
        step = args.prefill_step_size or model.streaming.prefill_step_size
        yield from generate_step(prompt, model, prefill_step_size=step, **options)

    def save(file: str, cache: list[Any], metadata: dict[str, str]) -> None:
        folder = Path(args.model).expanduser()
        name = str(folder.resolve()) if folder.is_dir() else args.model  # continued from wherever the user is then
        save_prompt_cache(path, cache, metadata | {"model": name} | cache_settings(models[0], args.adapter_path))

    with mock.patch.multiple(
        mlx_cache_prompt,
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load=streamed_load(args, config),
        generate_step=read_prompt,
        save_prompt_cache=save,
    ):
        mlx_cache_prompt.main()
    finish(models[0].streaming, config)
