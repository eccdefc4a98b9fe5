"""Speed of reading a prompt: mlx-lm with all experts in memory, and streaming at several budgets, in turns.

    python -m benchmarks.prefill --model FOLDER --tokens 256

``bytes_ratio`` is what streaming read over the bytes of the distinct experts that the prompt is routed to, as mlx-lm's
own model tells them; 1 means that each was read once. ``predicted_tps`` is what bytes allow while reads hide behind the
computation, or it behind them: the slower of mlx-lm's time and the bytes at the rate of the reader from the page cache.
"One at a time" is how an engine without prefill reads a prompt. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

import flashmoe_mlx
from benchmarks.decode import read_rate
from benchmarks.exact import load_resident
from benchmarks.record import record
from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.layers.switch import StreamedSwitchGLU


def seconds(model: nn.Module, prompt: list[int], step: int) -> float:
    """The time to read a prompt, ``step`` tokens at a time."""
    cache = make_prompt_cache(model)
    begin = time.perf_counter()
    for first in range(0, len(prompt), step):
        mx.eval(model(mx.array([prompt[first : first + step]]), cache=cache)[:, -1])
    return time.perf_counter() - begin


def distinct_experts(model: nn.Module, prompt: list[int], step: int) -> int:
    """How many experts the steps of a prompt need, each counted once a step, in all layers."""
    count = 0
    call = SwitchGLU.__call__

    def counting_call(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        nonlocal count
        count += np.unique(np.asarray(indices)).size
        return call(self, x, indices)

    with mock.patch.object(SwitchGLU, "__call__", counting_call):
        seconds(model, prompt, step)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step", type=int, help="tokens at a time (default: what streaming chooses at budget 0)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 0.25, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to results/prefill.csv")
    args = parser.parse_args()

    resident = load_resident(args.model)
    streamed, tokenizer = flashmoe_mlx.load(args.model)
    args.step = args.step or streamed.streaming.prefill_step_size
    experts_nbytes = streamed.streaming.experts_nbytes
    prompt = np.random.default_rng(0).integers(0, len(tokenizer.vocab), args.tokens).tolist()
    table = next(m._table for m in streamed.modules() if isinstance(m, StreamedSwitchGLU))
    expert_nbytes = table.expert_nbytes  # those of other layers are as large
    needed_nbytes = distinct_experts(resident, prompt, args.step) * expert_nbytes
    files = list(find_folder(args.model).glob("*.safetensors"))
    rate = read_rate(files, expert_nbytes, experts=16, cold=False)
    one_at_a_time = args.tokens / 20 * seconds(streamed, prompt[:20], 1)  # of a part, for patience

    runs: list[dict[str, Any]] = []
    for budget in args.budgets:
        streamed, _ = flashmoe_mlx.load(args.model, ram_budget=int(budget * experts_nbytes))
        seconds(streamed, prompt, args.step), seconds(resident, prompt, args.step)  # warm up
        counters = streamed.streaming.counters
        nbytes = counters.bytes_read
        pairs = [
            (seconds(resident, prompt, args.step), seconds(streamed, prompt, args.step)) for _ in range(args.rounds)
        ]
        nbytes = counters.bytes_read - nbytes
        their_seconds = median(theirs for theirs, _ in pairs)
        run = {
            "budget": budget,
            "tps": round(args.tokens / median(ours for _, ours in pairs), 1),
            "predicted_tps": round(args.tokens / max(their_seconds, nbytes / args.rounds / rate), 1),
            "ratio": round(median(theirs / ours for theirs, ours in pairs), 3),
            "bytes_ratio": round(nbytes / (args.rounds * needed_nbytes), 3),
            "gb_read": round(nbytes / args.rounds / 1e9, 3),
            "resident_tps": round(args.tokens / their_seconds, 1),
            "one_at_a_time_tps": round(args.tokens / one_at_a_time, 1),
        }
        runs.append(run)
        print(
            f"budget {budget:4.0%}: {run['tps']} tok/s (bytes allow {run['predicted_tps']}), "
            f"{run['ratio']:.3f} of mlx-lm's, {run['gb_read']} GB read, "
            f"{run['bytes_ratio']:.2f} times the experts it needs",
            flush=True,
        )
    print(f"mlx-lm, all in memory: {run['resident_tps']} tok/s; one token at a time: {run['one_at_a_time_tps']} tok/s")
    if args.record:
        for run in runs:
            record("prefill", {"model": Path(args.model).name, "tokens": args.tokens, "step": args.step, **run})
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
