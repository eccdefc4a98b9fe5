"""Shows that streaming changes nothing: the same tokens and logits as mlx-lm with all experts in memory.

    python -m benchmarks.exact --model FOLDER

On a CPU every bit is the same with MLX's own operations. The native kernels add up in another order: with them the
budget must not change a bit, and log probabilities must be those of mlx-lm within 1e-5 of their size. On a GPU experts
are decoded by kernels that round once where MLX rounds several times: the budget must not change a bit either, and the
distance from float32 must not be larger than mlx-lm's own.

The model must fit into memory, because mlx-lm's copy of it does. The exit status is 1 if any of this does not hold. The
last line is JSON.
"""

import argparse
import json
import sys
from itertools import chain, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step

import flashmoe_mlx
from flashmoe_mlx.ops.dispatch import Backend, choose_backend

# Log probabilities by the native kernels may differ from mlx-lm's by this share of their size.
NATIVE_TOLERANCE = 1e-5


def load_resident(folder: str, **config: Any) -> nn.Module:
    """Load mlx-lm's own model, all in memory, which on a CPU computes in float32 as ours does.

    Args:
        folder (str): The checkpoint.
        config (Any): Entries that replace those of config.json.
    """
    model, _ = mlx_lm.load(folder, lazy=True, model_config=config)
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def decode(model: nn.Module, prompt: list[int], tokens: list[int] | int) -> tuple[list[int], mx.array]:
    """Return the tokens that a model would choose after a prompt.

    Args:
        model (nn.Module): mlx-lm's or ours.
        prompt (list[int]): The prompt.
        tokens (list[int] or int): What follows it, whatever the model chooses; or the number of greedy tokens.

    Returns:
        tuple: Choices, and the log probabilities ``[count, vocabulary]`` they were made from.
    """
    count, sampler = tokens, None
    if not isinstance(tokens, int):
        # mlx-lm decodes one token ahead.
        forced = chain(tokens, repeat(0))
        count, sampler = len(tokens), lambda _: mx.array([next(forced)])
    # On a GPU the rounding of large calls depends on their shapes, and these on how many experts fit into memory. Small
    # calls go to the kernels. On a CPU all shapes round alike.
    on_cpu = mx.default_device().type == mx.cpu
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=count,
        sampler=sampler,
        logits_processors=[lambda _, logits: logits.astype(mx.float32)],
        prefill_step_size=2048 if on_cpu else 8,
    )
    logprobs = mx.stack([each for _, each in steps])
    choices: list[int] = np.asarray(mx.argmax(logprobs, axis=-1)).tolist()
    return choices, logprobs


def in_float32(folder: str, prompt: list[int], tokens: list[int]) -> mx.array:
    """Return the log probabilities of ``tokens`` as a CPU computes them, ``[count, vocabulary]``."""
    with mx.stream(mx.cpu):
        logits = load_resident(folder)(mx.array([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        logprobs: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs)
    return logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face repo")
    parser.add_argument("--prompt", default="What is a heron?")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to compare (default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer = flashmoe_mlx.load(args.model)[:2]
    experts_nbytes = model.streaming.experts_nbytes
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)
    tokens, logprobs = decode(load_resident(args.model), prompt, args.tokens)
    on_cpu = mx.default_device().type == mx.cpu
    exact = logprobs if on_cpu else in_float32(args.model, prompt, tokens)
    resident_error = _error(logprobs, exact)
    if not on_cpu:
        print(f"mlx-lm with all experts in memory: log probabilities differ by {resident_error:.5f} from float32's")
    runs: list[dict[str, Any]] = []
    first = None
    for share in (0, 25, 100):
        model = flashmoe_mlx.load(args.model, ram_budget=experts_nbytes * share // 100)[0]
        choices, streamed = decode(model, prompt, tokens)
        first = streamed if first is None else first
        run = {
            "budget": share / 100,
            "equal_tokens": sum(a == b for a, b in zip(tokens, choices, strict=True)),
            "tokens": args.tokens,
            "max_drift": mx.abs(streamed - logprobs).max().item(),
            "max_drift_between_budgets": mx.abs(streamed - first).max().item(),
            "error": _error(streamed, exact),
            "resident_error": resident_error,
        }
        runs.append(run)
        print(
            f"{share:3d}% of the experts in memory: {run['equal_tokens']} of {args.tokens} tokens equal mlx-lm's, "
            f"largest difference of a log probability {run['max_drift']:g}"
            + ("" if on_cpu else f", {run['error']:.5f} from float32's; {run['max_drift_between_budgets']:g} from 0%'s")
        )
    print(json.dumps({"runs": runs}))
    allowed = 1.1 * resident_error
    if choose_backend() is Backend.NATIVE:
        allowed = NATIVE_TOLERANCE * _error(exact, mx.zeros_like(exact))
    same = all(run["max_drift_between_budgets"] == 0 and run["error"] <= allowed for run in runs)
    sys.exit(not same)


def _error(actual: mx.array, exact: mx.array) -> float:
    """Return the root mean square of the differences of log probabilities."""
    return float(mx.sqrt(mx.mean(mx.square(actual.astype(mx.float32) - exact))))


if __name__ == "__main__":
    main()
