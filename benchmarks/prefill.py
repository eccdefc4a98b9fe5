"""Speed of reading a prompt: mlx-lm with all experts in memory, and streaming at several budgets, in turns.

    python -m benchmarks.prefill --model FOLDER --tokens 256

``bytes_ratio`` is what streaming read over the bytes of the distinct experts that the prompt is routed to, as counted
in mlx-lm's own model; 1 means that each was read once.

The law on a CPU is ``seconds = seconds with every expert a hit + missed bytes / bandwidth``: an expert is read while
others are computed, but from the page cache, by the cores that compute. On a GPU it is the longer of the two. The first
is measured on a model that streams, with a slot for every expert, in the same round; the bandwidth is that of fetches
from the page cache. ``measured_over_predicted`` is the ratio of tokens per second. Lines of results/prefill.csv without
``all_hits_tps`` predict from mlx-lm's seconds instead.

"One at a time" is how an engine without prefill reads a prompt. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

import flashmoe_mlx
from benchmarks.exact import load_resident
from benchmarks.fetch import Fetcher
from benchmarks.models import checkpoint_files, expert_tables, load_all_hits, sizes
from benchmarks.page_cache import bring
from benchmarks.record import record


class Round(NamedTuple):
    """Seconds to read the prompt once with each model.

    Args:
        mlx_lm (float): mlx-lm's, all experts in memory.
        all_hits (float): Ours, every expert a hit.
        streamed (float): Ours at the budget.
        reads (float): The reads alone, by the bandwidth of this round.
    """

    mlx_lm: float
    all_hits: float
    streamed: float
    reads: float

    @property
    def predicted(self) -> float:
        """Return the seconds of the law."""
        on_cpu = mx.default_device().type == mx.cpu
        return self.all_hits + self.reads if on_cpu else max(self.all_hits, self.reads)


def seconds(model: nn.Module, prompt: list[int], step: int) -> float:
    """Return the time to read a prompt, ``step`` tokens at a time."""
    cache = make_prompt_cache(model)
    begin = time.perf_counter()
    for first in range(0, len(prompt), step):
        mx.eval(model(mx.array([prompt[first : first + step]]), cache=cache)[:, -1])
    return time.perf_counter() - begin


def distinct_experts(model: nn.Module, prompt: list[int], step: int) -> int:
    """Return how many experts the steps of a prompt need, each counted once a step, in all layers."""
    count = 0
    call = SwitchGLU.__call__

    def counting_call(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        nonlocal count
        count += np.unique(np.asarray(indices)).size
        y: mx.array = call(self, x, indices)
        return y

    with mock.patch.object(SwitchGLU, "__call__", counting_call):
        seconds(model, prompt, step)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face repo; it must fit into memory")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt (default: %(default)s)")
    parser.add_argument("--step", type=int, help="tokens at a time (default: as streaming chooses at budget 0)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0, 0.25, 1], help="shares of all experts (default: 0 0.25 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the figures to results/prefill.csv")
    args = parser.parse_args()

    streaming, tables, files = sizes(args.model), expert_tables(args.model), checkpoint_files(args.model)
    args.step = args.step or streaming.prefill_step_size
    theirs, all_hits = load_resident(args.model), load_all_hits(args.model)
    model, tokenizer = flashmoe_mlx.load(args.model)[:2]
    prompt = np.random.default_rng(0).integers(0, len(tokenizer.vocab), args.tokens).tolist()
    # Of a part, because it takes long.
    one_at_a_time = args.tokens / 20 * seconds(model, prompt[:20], 1)
    needed_nbytes = distinct_experts(theirs, prompt, args.step) * tables[0].expert_nbytes
    bring(files)
    fetched = min(16, tables[0].experts)
    fetcher = Fetcher(tables, files, fetched)

    runs: list[dict[str, Any]] = []
    for budget in args.budgets:
        model = flashmoe_mlx.load(args.model, ram_budget=int(budget * streaming.experts_nbytes))[0]
        counters = model.streaming.counters
        models = {"mlx_lm": theirs, "all_hits": all_hits, "streamed": model}
        for each in models.values():
            # Warm up.
            seconds(each, prompt, args.step)
        rounds, before = [], counters.bytes_read
        for number in range(args.rounds):
            nbytes = counters.bytes_read
            names = list(models)[:: -1 if number % 2 else 1]
            taken = {name: seconds(models[name], prompt, args.step) for name in names}
            reads = (counters.bytes_read - nbytes) / fetcher.bandwidth(fetched, 16)
            rounds.append(Round(**taken, reads=reads))
        nbytes = counters.bytes_read - before
        run = {
            "budget": budget,
            "tps": round(args.tokens / median(each.streamed for each in rounds), 1),
            "predicted_tps": round(args.tokens / median(each.predicted for each in rounds), 1),
            "measured_over_predicted": round(median(each.predicted / each.streamed for each in rounds), 3),
            "all_hits_tps": round(args.tokens / median(each.all_hits for each in rounds), 1),
            "ratio": round(median(each.mlx_lm / each.streamed for each in rounds), 3),
            "bytes_ratio": round(nbytes / (args.rounds * needed_nbytes), 3),
            "gb_read": round(nbytes / args.rounds / 1e9, 3),
            "resident_tps": round(args.tokens / median(each.mlx_lm for each in rounds), 1),
            "one_at_a_time_tps": round(args.tokens / one_at_a_time, 1),
        }
        runs.append(run)
        print(
            f"budget {budget:4.0%}: {run['tps']} tok/s, predicted {run['predicted_tps']}, measured / predicted "
            f"{run['measured_over_predicted']:.2f}; {run['ratio']:.2f} times mlx-lm's; {run['gb_read']} GB read, "
            f"{run['bytes_ratio']:.2f} times the experts it needs; all hits: {run['all_hits_tps']} tok/s",
            flush=True,
        )
    print(f"mlx-lm, all in memory: {run['resident_tps']} tok/s; one token at a time: {run['one_at_a_time_tps']} tok/s")
    if args.record:
        for run in runs:
            record("prefill", {"model": Path(args.model).name, "tokens": args.tokens, "step": args.step, **run})
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
