"""Generate text with streamed experts: mlx_lm.generate with all of its flags, and those of expert streaming.

flashmoe generate --model FOLDER_OR_REPO --prompt "What is a heron?"
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import importlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.generate import setup_arg_parser as mlx_lm_parser
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.processors import load_processor
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.cli.arguments import complete, extend_parser, parse
from flashmoe_mlx.cli.chat_template import render
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, kv_cache_settings, sampler_of, streamed_load
from flashmoe_mlx.generation.kv_cache import (
    RotatingKVCache,
    can_roll_back,
    check_quantization,
    make_kv_cache,
    plan_prefill,
    refuse_context,
)
from flashmoe_mlx.generation.prompt_cache import RestoredPrompt
from flashmoe_mlx.model.budget import refuse_excess
from flashmoe_mlx.model.load import load_lazily
from flashmoe_mlx.model.tokenizer import load_tokenizer
from flashmoe_mlx.system.text import read_stdin

EPILOG = """examples:
  flashmoe generate --model mlx-community/Qwen3.5-397B-A17B-4bit --prompt "What is a heron?"
  flashmoe generate --model ./model --ram-budget 12GB --config exact --prompt - < question.txt
  flashmoe generate --prompt-cache-file manual.safetensors --prompt "What is a heron?"
"""

_QUERY = "<query>"
"""Text in place of the prompt when its position in the chat template is looked up."""

_OWN_OPTIONS = frozenset(
    ("add_generation_prompt", "continue_final_message", "conversation", "messages", "return_dict", "tokenize")
)
"""Options of chat templates that are not the user's."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return mlx_lm.generate's parser with the flags of expert streaming."""
    description = "Generate text with a Mixture-of-Experts model whose experts stay on disk."
    return extend_parser(mlx_lm_parser(), description, EPILOG)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): Command line without the program's name. Default: ``sys.argv[1:]``.
    """
    parser = setup_arg_parser()
    args = parse(parser, argv)
    restored = None if args.prompt_cache_file is None else RestoredPrompt.load(args.prompt_cache_file)
    if restored is not None:
        _apply_restored(args, restored)
    config = complete(args, parser)
    if args.max_tokens < 1 and args.max_tokens != -1:
        raise ValueError(f"--max-tokens is {args.max_tokens}: it must be a positive integer, or -1 for no limit")
    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer, model_config = streamed_load(args, config)(
        args.model,
        tokenizer_config={} if restored is None else json.loads(restored.metadata["tokenizer_config"]),
        model_config={"quantize_activations": args.quantize_activations},
        return_config=True,
    )
    if restored is not None:
        restored.refuse_other_model(model, args.adapter_path)
    check_quantization(model, args.kv_bits, args.kv_group_size, args.max_kv_size)
    cache = make_kv_cache(model, args.max_kv_size) if restored is None else restored.cache
    draft_model = None
    if args.draft_model is not None:
        draft_model = _draft_model(args, tokenizer)
        cache += _draft_cache(args, cache, draft_model)
    for token in args.extra_eos_token:
        _add_eos_token(tokenizer, token)
    text, is_chat = _render_prompt(args, tokenizer, restored is not None)
    tokens, embeddings = _encode(args, model, tokenizer, model_config, text, is_chat)
    kv_cache = kv_cache_settings(args)
    cached = 0 if restored is None else restored.tokens
    prompt = len(tokens) + cached
    plan = plan_prefill(model, prompt, args.prefill_step_size, cached=cached, max_kv_size=args.max_kv_size, **kv_cache)
    total = prompt + max(0, args.max_tokens)
    refuse_context(model, total, plan.step_size, max_kv_size=args.max_kv_size, **kv_cache)
    say = mlx_lm.generate if args.verbose else _generate_silently
    say(
        model,
        tokenizer,
        tokens,
        verbose=args.verbose,
        max_tokens=args.max_tokens,
        sampler=sampler_of(args, tokenizer, args.min_tokens_to_keep),
        prefill_step_size=plan.step_size,
        prompt_cache=cache,
        **kv_cache,
        draft_model=draft_model,
        num_draft_tokens=args.num_draft_tokens,
        input_embeddings=embeddings,
        prompt_progress_callback=PromptProgress(),
    )
    finish(model.streaming, config, args.verbose)


def _apply_restored(args: argparse.Namespace, restored: RestoredPrompt) -> None:
    """Take the model from a prompt cache, and refuse flags that do not go with it."""
    own = restored.metadata["model"]
    args.model = own if args.model is None else restored.same_model(args.model)
    restored.refuse_changed_checkpoint(args.model, args.trust_remote_code)
    if args.draft_model is not None:
        raise ValueError(f"{restored.path} holds no state of a draft model: leave out --draft-model")
    sizes = {cache.max_size for cache in restored.cache if isinstance(cache, RotatingKVCache) and cache.keep}
    if args.max_kv_size is not None and args.max_kv_size not in sizes:
        made = f"--max-kv-size {sizes.pop()}" if sizes else "no --max-kv-size"
        raise ValueError(f"{restored.path} was made with {made}, and now it is {args.max_kv_size}: leave it out")
    args.max_kv_size = next(iter(sizes), None)
    for cache in restored.cache:
        if isinstance(cache, QuantizedKVCache):
            for flag, given, stored in (
                ("--kv-bits", args.kv_bits, cache.bits),
                ("--kv-group-size", args.kv_group_size, cache.group_size),
            ):
                if given not in (None, stored):
                    raise ValueError(
                        f"{restored.path} was made with {flag} {stored}, and now it is {given}: pass {flag} {stored}"
                    )


def _render_prompt(args: argparse.Namespace, tokenizer: TokenizerWrapper, is_suffix: bool) -> tuple[str, bool]:
    """Return the prompt's text, and if the chat template was applied to it.

    Args:
        args (Namespace): The command line.
        tokenizer (TokenizerWrapper): Of the model.
        is_suffix (bool): The prompt continues a saved one, so what the template puts in front of it is left out.
    """
    prompt: str = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if prompt == "-":
        prompt = read_stdin()
    if not prompt and not args.image:
        raise ValueError("the prompt is empty: --prompt takes a text, or - for stdin")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return prompt, False
    options = {} if args.chat_template_config is None else _template_options(args.chat_template_config)

    def chat(query: str) -> str:
        messages = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
        messages.append({"role": "user", "content": query})
        has_prefill = args.prefill_response is not None
        if has_prefill:
            messages.append({"role": "assistant", "content": args.prefill_response})
        text: str = render(
            tokenizer,
            messages,
            tokenize=False,
            continue_final_message=has_prefill,
            add_generation_prompt=not has_prefill,
            **options,
        )
        return text

    beginning, marked, _ = chat(_QUERY).partition(_QUERY) if is_suffix else ("", True, "")
    if not marked:
        raise ValueError("this chat template changes or drops the prompt: it cannot continue a prompt cache")
    return chat(prompt)[len(beginning) :], True


def _template_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--chat-template-config is {text}: it must be a JSON object")
    if set(options) & _OWN_OPTIONS:
        name = min(set(options) & _OWN_OPTIONS)
        raise ValueError(f"--chat-template-config has {name}, which this command sets itself: leave it out")
    return options


def _encode(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    model_config: dict[str, Any],
    text: str,
    is_chat: bool,
) -> tuple[list[int], mx.array | None]:
    """Return the prompt's tokens and, if there are images, the embeddings of tokens and images."""
    pixels = None
    if args.image:
        processor = load_processor(model, model_config)
        if processor is None:
            raise ValueError(f"{args.model} takes no images: leave out --image")
        text, pixels = processor(text, images=_read_images(args.image))
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=not is_chat)
    if not tokens:
        raise ValueError(f"the chat template or the tokenizer of {args.model} makes nothing of this prompt")
    if pixels is None:
        return tokens, None
    embeddings = model.embed_inputs(mx.array(tokens), pixel_values=pixels)
    # Prefill runs on another stream, which must not wait for this one.
    mx.eval(embeddings)
    return tokens, embeddings


def _read_images(files: Sequence[str]) -> list[np.ndarray]:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("--image needs Pillow: pip install pillow")
    image = importlib.import_module("PIL.Image")
    return [np.asarray(image.open(file).convert("RGB")) for file in files]


def _draft_model(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> nn.Module:
    """Load the draft model in memory, since it is small and rarely a Mixture of Experts."""
    checkpoint = Checkpoint(find_folder(args.draft_model))
    refuse_excess(sum(tensor.span.nbytes for tensor in checkpoint.tensors.values()), 0)
    own_tokenizer = load_tokenizer(checkpoint.folder)
    if own_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{args.draft_model} has {own_tokenizer.vocab_size} tokens, and the model {tokenizer.vocab_size}: a draft "
            "model must have the same tokenizer"
        )
    draft, _ = load_lazily(checkpoint, {}, trust_remote_code=False)
    mx.eval(draft.parameters())
    return draft


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    known = 0 <= int(token) < len(tokenizer) if token.isdecimal() else token in tokenizer.get_vocab()
    if not known:
        raise ValueError(f"--extra-eos-token is {token!r}, which is not a token of this model: give its text or number")
    tokenizer.add_eos_token(token)


def _draft_cache(args: argparse.Namespace, cache: Sequence[Any], draft_model: nn.Module) -> list[Any]:
    """Return the cache of a draft model, if rejected tokens can be removed from both caches."""
    if args.max_kv_size is not None:
        raise ValueError("a draft model needs a KV cache without a limit: leave out --max-kv-size or --draft-model")
    draft_cache = make_kv_cache(draft_model)
    for name, each in ((args.model, cache), (args.draft_model, draft_cache)):
        if not can_roll_back(each):
            raise ValueError(
                f"{name} has a state that tokens cannot be removed from, such as a sliding window: leave out "
                "--draft-model"
            )
    return draft_cache


def _generate_silently(
    model: nn.Module, tokenizer: TokenizerWrapper, tokens: list[int], *, verbose: bool, **options: Any
) -> None:
    """Generate, and print the text at the end, or as far as it got before an error or Ctrl-C."""
    text = ""
    try:
        for response in mlx_lm.stream_generate(model, tokenizer, tokens, **options):
            text += response.text
    finally:
        print(text)
