"""Generate text with streamed experts: mlx_lm.generate, every flag of it, and ours.

python -m flashmoe_mlx.generate --model FOLDER_OR_REPO --prompt "What is a heron?"
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import mlx_lm

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, streamed_load
from flashmoe_mlx.generation.prompt_cache import RestoredPrompt

EPILOG = """examples:
  python -m flashmoe_mlx.generate --model mlx-community/Qwen3.5-397B-A17B-4bit --prompt "What is a heron?"
  python -m flashmoe_mlx.generate --model ./model --ram-budget 12GB --config exact --prompt - < question.txt
  python -m flashmoe_mlx.generate --prompt-cache-file manual.safetensors --prompt "What is a heron?"
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
    restored = None
    if args.prompt_cache_file is not None:
        restored = RestoredPrompt.load(args.prompt_cache_file)
        parser.set_defaults(model=restored.metadata["model"])
    args, config = parse_arguments(parser, argv)
    if restored is not None and args.draft_model is not None:
        raise ValueError(f"{restored.path} holds no state of a draft model: leave out --draft-model")

    def load_prompt_cache(file: str, return_metadata: bool) -> tuple[list[Any], dict[str, str]]:
        assert restored is not None and return_metadata
        return restored.cache, restored.metadata | {"model": restored.same_model(args.model)}

    def generate(model: Any, tokenizer: Any, prompt: Any, *, prefill_step_size: int | None, **options: Any) -> str:
        if restored is not None:
            restored.refuse_other_model(model, args.adapter_path)
        tokens = len(prompt) + max(0, args.max_tokens)
        model.streaming.refuse_context(min(tokens, args.max_kv_size or tokens), args.kv_bits, args.kv_group_size)
        step = prefill_step_size or model.streaming.prefill_step_size
        progress = PromptProgress()
        say = mlx_lm.generate if args.verbose else _generate_silently
        text: str = say(model, tokenizer, prompt, prefill_step_size=step, prompt_progress_callback=progress, **options)
        finish(model.streaming, config, args.verbose)
        return text

    with mock.patch.multiple(
        _mlx_generate(),
        setup_arg_parser=lambda: SimpleNamespace(parse_args=lambda: args),
        load_prompt_cache=load_prompt_cache,
        load=streamed_load(args, config),
        generate=generate,
    ):
        _mlx_generate().main()


def _generate_silently(model: Any, tokenizer: Any, prompt: Any, *, verbose: bool, **options: Any) -> str:
    """mlx_lm.generate, whose text mlx_lm's main() prints at the end; or here, if it does not come to that."""
    text = ""
    try:
        for response in mlx_lm.stream_generate(model, tokenizer, prompt, **options):
            text += response.text
    except BaseException:
        print(text)
        raise
    return text


def _mlx_generate() -> ModuleType:
    # As an attribute, mlx_lm.generate is the function.
    return importlib.import_module("mlx_lm.generate")
