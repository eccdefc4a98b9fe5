"""Process a prompt once and save its state to a file: mlx_lm.cache_prompt with the flags of expert streaming.

flashmoe cache-prompt --model FOLDER_OR_REPO --prompt "All about herons: ..." --prompt-cache-file herons.safetensors
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx_lm.cache_prompt import setup_arg_parser as mlx_lm_parser
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.chat_template import render
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, kv_cache_settings, streamed_load
from flashmoe_mlx.generation.kv_cache import check_quantization, make_kv_cache, plan_prefill, refuse_context
from flashmoe_mlx.generation.prompt_cache import (
    cache_path,
    cache_settings,
    checkpoint_identity,
    save_prompt_cache,
)
from flashmoe_mlx.system.text import read_stdin

EPILOG = """examples:
  flashmoe cache-prompt --model ./model --prompt - --prompt-cache-file manual.safetensors < manual.txt
  flashmoe generate --prompt-cache-file manual.safetensors --prompt "What is a heron?"
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return mlx_lm.cache_prompt's parser with the flags of expert streaming."""
    description = "Save the state after a prompt to a file that flashmoe generate continues from."
    return extend_parser(mlx_lm_parser(), description, EPILOG)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): Command line without the program's name. Default: ``sys.argv[1:]``.
    """
    args, config = parse_arguments(setup_arg_parser(), argv)
    path = cache_path(args.prompt_cache_file)
    # Refused now rather than after a long prompt.
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise OSError(f"cannot write {path}: its folder is missing or read-only, or it is a folder itself")
    tokenizer_config = {"trust_remote_code": args.trust_remote_code}
    if args.eos_token is not None:
        tokenizer_config["eos_token"] = args.eos_token
    # Taken before the weights are read, so that a later change is noticed.
    identity = checkpoint_identity(args.model, args.trust_remote_code)
    model, tokenizer = streamed_load(args, config)(args.model, tokenizer_config=tokenizer_config)
    cache = make_kv_cache(model, args.max_kv_size)
    check_quantization(model, args.kv_bits, args.kv_group_size, args.max_kv_size)
    tokens = _encode(read_stdin() if args.prompt == "-" else args.prompt, tokenizer)
    kv_cache = kv_cache_settings(args)
    plan = plan_prefill(model, len(tokens), args.prefill_step_size, max_kv_size=args.max_kv_size, **kv_cache)
    refuse_context(model, len(tokens), plan.step_size, max_kv_size=args.max_kv_size, **kv_cache)
    for _ in generate_step(
        mx.array(tokens),
        model,
        max_tokens=0,
        prompt_cache=cache,
        prefill_step_size=plan.step_size,
        **kv_cache,
        prompt_progress_callback=PromptProgress(),
    ):
        pass
    print(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
    print("Saving...")
    metadata = {
        "model": _absolute(args.model),
        "tokenizer_config": json.dumps(tokenizer_config),
        "checkpoint": identity,
    }
    save_prompt_cache(path, cache, metadata | cache_settings(model, args.adapter_path))
    finish(model.streaming, config)


def _encode(prompt: str, tokenizer: TokenizerWrapper) -> list[int]:
    """Return the tokens of a prompt, as a user's message that may be continued if there is a chat template."""
    if not prompt:
        raise ValueError("the prompt is empty: --prompt takes a text, or - for stdin")
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    return list(render(tokenizer, messages, add_generation_prompt=False, continue_final_message=True))


def _absolute(model: str) -> str:
    """Return the path of a model folder from anywhere, or a repository's name as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
