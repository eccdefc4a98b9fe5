"""Decoding speed of mlx-lm with all experts in memory, and of streaming at several budgets, on the same checkpoint.

    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 1
    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 --cold

The two take turns of a few tokens, so that a machine that slows down slows both; ratios are of neighbouring turns, and
everything is a median. Budgets are shares of all experts. Cold, the page cache is emptied of the checkpoint before each
token. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

import flashmoe_mlx
from benchmarks.exact import load_resident
from benchmarks.io import evict
from benchmarks.record import record
from flashmoe_mlx.checkpoint import find_folder


def seconds_per_token(
    model: nn.Module, prompt: list[int], turn: int, before_turn: Callable[[], None]
) -> Iterator[float]:
    """Decode for ever; yield the mean time of each turn of ``turn`` tokens, all its work done."""
    steps = generate_step(mx.array(prompt), model, max_tokens=-1)
    next(steps)
    while True:
        mx.synchronize(generation_stream)
        before_turn()
        begin = time.perf_counter()
        for _ in range(turn):
            next(steps)
        mx.synchronize(generation_stream)
        yield (time.perf_counter() - begin) / turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 0.25, 0.5, 1])
    parser.add_argument("--prompt", default="What is a heron?")
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--turn", type=int, default=8, help="tokens a turn (default: 8)")
    parser.add_argument("--cold", action="store_true", help="read from the disk (Linux only): turns of a single token")
    parser.add_argument("--record", action="store_true", help="append the figures to results/decode.csv")
    args = parser.parse_args()

    files: list[Path] = []
    if args.cold:
        args.turn = 1  # what the page cache learns in a turn, it knows
        files = list(find_folder(args.model).glob("*.safetensors"))

    def before_turn() -> None:
        for file in files:
            evict(file)

    resident = load_resident(args.model)
    streamed, tokenizer = flashmoe_mlx.load(args.model)
    experts_nbytes = streamed.streaming.experts_nbytes
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)
    resident_seconds: list[float] = []
    runs: list[dict[str, Any]] = []
    for budget in args.budgets:
        streamed, _ = flashmoe_mlx.load(args.model, ram_budget=int(budget * experts_nbytes))
        counters = streamed.streaming.counters
        ours = seconds_per_token(streamed, prompt, args.turn, before_turn)
        theirs = seconds_per_token(resident, prompt, args.turn, before_turn)
        next(ours), next(theirs)  # warm up
        before = replace(counters)
        pairs = [(next(theirs), next(ours)) for _ in range(args.turns)]
        hits, misses = counters.hits - before.hits, counters.misses - before.misses
        nbytes = counters.bytes_read - before.bytes_read
        read_seconds = counters.read_seconds - before.read_seconds
        our_seconds = args.turn * sum(pair[1] for pair in pairs)
        resident_seconds += [pair[0] for pair in pairs]
        run = {
            "budget": budget,
            "tps": round(1 / median(pair[1] for pair in pairs), 2),
            "ratio": round(median(a / b for a, b in pairs), 3),
            "hit_rate": round(hits / (hits + misses), 3) if hits + misses else 1.0,
            "mb_per_token": round(nbytes / 1e6 / args.turns / args.turn, 2),
            "read_share": round(read_seconds / our_seconds, 3),
            "read_gbps": round(nbytes / 1e9 / read_seconds, 2) if read_seconds else None,
            "sync_share": round((counters.sync_seconds - before.sync_seconds) / our_seconds, 3),
        }
        runs.append(run)
        print(
            f"budget {budget:4.0%}: {run['tps']:6.2f} tok/s, {run['ratio']:.3f} of mlx-lm's, "
            f"{run['hit_rate']:.1%} hits, {run['mb_per_token']} MB a token, "
            f"{run['read_share']:.0%} of the time in reads, {run['sync_share']:.0%} waiting for routers"
        )
    resident_tps = round(1 / median(resident_seconds), 2)
    print(f"mlx-lm, all in memory: {resident_tps:.2f} tok/s")
    if args.record:
        for run in runs:
            record("decode", {"model": Path(args.model).name, "cold": args.cold, "resident_tps": resident_tps, **run})
    print(json.dumps({"resident_tps": resident_tps, "runs": runs}))


if __name__ == "__main__":
    main()
