"""Shows that streaming changes nothing: the same greedy tokens and logits as mlx-lm with all experts in memory.

    python -m benchmarks.exact --model FOLDER

The model must fit into memory, because mlx-lm's copy of it does. The last line is JSON.
"""

import argparse
import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generate_step

import flashmoe_mlx


def load_resident(folder: str, **config: Any) -> nn.Module:
    """mlx-lm's own model, all in memory, computing in float32 on a CPU as ours does; ``config`` replaces entries."""
    model, _ = mlx_lm.load(folder, lazy=True, model_config=config)
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def decode(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], mx.array]:
    """Greedy tokens, and the log probabilities ``[count, vocabulary]`` they were chosen from."""
    tokens, logprobs = zip(*generate_step(mx.array(prompt), model, max_tokens=count), strict=True)
    return list(tokens), mx.stack(logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", default="What is a heron?")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    model, tokenizer = flashmoe_mlx.load(args.model)
    experts_nbytes = model.streaming.experts_nbytes
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)
    tokens, logprobs = decode(load_resident(args.model), prompt, args.tokens)
    runs = []
    for share in (0, 25, 100):
        model, _ = flashmoe_mlx.load(args.model, ram_budget=experts_nbytes * share // 100)
        streamed_tokens, streamed_logprobs = decode(model, prompt, args.tokens)
        equal = sum(a == b for a, b in zip(tokens, streamed_tokens, strict=True))
        drift = mx.abs(streamed_logprobs - logprobs).max().item()
        runs.append({"budget": share / 100, "equal_tokens": equal, "tokens": args.tokens, "max_drift": drift})
        print(
            f"{share:3d}% of the experts in memory: {equal} of {args.tokens} tokens equal mlx-lm's, "
            f"largest difference of a log probability {drift:g}"
        )
    print(json.dumps({"runs": runs}))
    sys.exit(any(run["equal_tokens"] < run["tokens"] for run in runs))


if __name__ == "__main__":
    main()
