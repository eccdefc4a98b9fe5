"""Decoding speed of mlx-lm with all experts in memory, and of streaming at several budgets, on the same checkpoint.

    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 1
    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 --cold
    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 --leave 5GB

Three models take turns of a few tokens, so that a machine that slows down slows them all: mlx-lm's, ours with every
expert a hit, and ours at a budget. Ratios are those of one round, and everything is a median. Budgets are shares of all
experts. Cold, the checkpoint is evicted from the page cache before each token. With ``--leave``, another process takes
all memory but that much; the first two models are measured before, and mlx-lm's own way to run a model that is larger
than memory is tried as well.

The law is ``seconds per token = seconds with every expert a hit + missed bytes / bandwidth``. The first term is
measured on a model that streams, host syncs included, with a slot for every expert: trunk, experts and waiting for
routers. The bandwidth is that of fetching as many random experts as a layer misses, measured in the same round: from
the device for the bytes that it delivered, from the page cache for the others.

The law assumes that nothing overlaps with reads. Where it fails:

- The shared expert and the resident experts are computed during reads. Where reads leave the processor alone, which is
  a device's, not a page cache's, decoding is faster than the law. So it is with ``--lookahead``.
- A layer with hits and misses computes its experts in two launches, and merges them. If experts are small, that costs
  as much as their reads, and decoding is slower.
- At budget 1 layers do not wait for routers, and decoding is faster.

``measured_over_predicted`` is the ratio of tokens per second. Lines of results/decode.csv without ``all_hits_tps``
predict from mlx-lm's seconds instead. The last line of the output is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice, repeat
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

import flashmoe_mlx
from benchmarks.exact import load_resident
from benchmarks.fetch import Fetcher
from benchmarks.memory_hog import memory_hog
from benchmarks.models import checkpoint_files, expert_tables, fill, load_all_hits, sizes
from benchmarks.page_cache import bring, can_evict, device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx.checkpoint.folder import find_folder, read_config
from flashmoe_mlx.config import Config, parse_size
from flashmoe_mlx.streaming.counters import Counters

_MLX_LM = """
import sys, time
from pathlib import Path
# Of Linux: if memory runs out, this process ends before all others.
score = Path("/proc/self/oom_score_adj")
if score.exists():
    score.write_text("1000")
from benchmarks.exact import load_resident
import mlx.core as mx
begin = time.perf_counter()
model = load_resident(sys.argv[1])
for tokens in range(1, 9):
    mx.eval(model(mx.array([[tokens]])))
    print(tokens, time.perf_counter() - begin, flush=True)
"""


def seconds_per_token(
    model: nn.Module, prompt: list[int], turn: int, before_turn: Callable[[], None]
) -> Iterator[float]:
    """Decode without end; yield the mean time of each turn of ``turn`` tokens, all its work done."""
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


def mlx_lm_alone(folder: str, seconds: int = 240) -> str:
    """Describe how mlx-lm's own lazy loading decodes its first eight tokens in the memory that is free."""
    command = [sys.executable, "-c", _MLX_LM, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"fewer than eight tokens in {seconds} s"
    if done.returncode < 0:
        return f"killed (signal {-done.returncode})"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    first, *_, last = (float(line.split()[1]) for line in done.stdout.splitlines())
    return f"first token after {first:.1f} s, then {7 / (last - first):.2f} tok/s"


@dataclass
class Bandwidth:
    """Bytes per second at which missing experts are fetched.

    Args:
        fetcher (Fetcher): Measures it.
        device (float): From the device; infinite where the page cache cannot be emptied.
        cache (list[float]): From the page cache, the latest measurement last.
    """

    fetcher: Fetcher
    device: float
    cache: list[float]

    @classmethod
    def measure(cls, fetcher: Fetcher, files: Sequence[Path], experts: int) -> Self:
        """Measure both in fetches of that many experts of a checkpoint, which is in the page cache afterwards."""
        device = fetcher.bandwidth(experts, 12, cold=True) if can_evict(files) else inf
        bring(files)
        return cls(fetcher, device, [fetcher.bandwidth(experts, 24)])

    def seconds(self, nbytes: int, delivered: int) -> float:
        """Return how long reads of ``nbytes`` take, of which the device delivers some and the page cache the rest."""
        # A device delivers whole pages, which are more.
        delivered = min(delivered, nbytes)
        return delivered / self.device + (nbytes - delivered) / self.cache[-1]


class Round(NamedTuple):
    """One turn of each model.

    Args:
        mlx_lm (float): Seconds per token of mlx-lm, all experts in memory.
        all_hits (float): Seconds per token of ours, every expert a hit.
        streamed (float): Seconds per token of ours at the budget.
        reads (float): Seconds per token that reads take by the law.
        delivered (int): Bytes that the device delivered.
    """

    mlx_lm: float
    all_hits: float
    streamed: float
    reads: float
    delivered: int

    @property
    def predicted(self) -> float:
        """Return the law's seconds per token."""
        return self.all_hits + self.reads


def play(
    args: argparse.Namespace,
    models: Mapping[str, Iterator[float]],
    counters: Counters,
    bandwidth: Bandwidth,
    layers: int,
) -> tuple[list[Round], Counters]:
    """Let models take turns; return the rounds, and what streaming counted in them.

    Args:
        args (argparse.Namespace): The command line.
        models (Mapping): Turns of ``mlx_lm``, ``all_hits`` and ``streamed``.
        counters (Counters): Of the streamed one.
        bandwidth (Bandwidth): Measured anew in each round.
        layers (int): Of the model.
    """
    next(models["streamed"])
    missed = round(counters.misses / (args.turn * layers))
    rounds = []
    start = replace(counters)
    for number in range(args.turns):
        nbytes, delivered = counters.bytes_read, device_bytes()
        names = list(models)[:: -1 if number % 2 else 1]
        seconds = {name: next(models[name]) for name in names}
        nbytes, delivered = counters.bytes_read - nbytes, device_bytes() - delivered
        # Except where that would change what the page cache holds.
        if missed and args.leave is None and not args.cold:
            bandwidth.cache.append(bandwidth.fetcher.bandwidth(missed, 2 * layers))
        reads = bandwidth.seconds(nbytes, delivered) / args.turn
        rounds.append(Round(**seconds, reads=reads, delivered=delivered))
    return rounds, Counters(**{name: value - getattr(start, name) for name, value in vars(counters).items()})


def figures(budget: float, rounds: Sequence[Round], counters: Counters, layers: int, tokens: int) -> dict[str, Any]:
    """Return what is recorded of a budget, from the rounds of ``tokens`` tokens in all."""
    routed = counters.hits + counters.misses
    seconds = median(each.streamed for each in rounds)
    total = sum(each.streamed for each in rounds) * tokens / len(rounds)
    return {
        "budget": budget,
        "ms_per_layer": round(1e3 * seconds / layers, 3),
        "tps": round(1 / seconds, 2),
        "ratio": round(median(each.mlx_lm / each.streamed for each in rounds), 3),
        "predicted_tps": round(1 / median(each.predicted for each in rounds), 2),
        "measured_over_predicted": round(median(each.predicted / each.streamed for each in rounds), 3),
        "all_hits_tps": round(1 / median(each.all_hits for each in rounds), 2),
        "hit_rate": round(counters.hits / routed, 3) if routed else 1.0,
        "mb_per_token": round(counters.bytes_read / 1e6 / tokens, 2),
        "device_mb_per_token": round(sum(each.delivered for each in rounds) / 1e6 / tokens, 2),
        "read_share": round(counters.read_seconds / total, 3),
        "sync_share": round(counters.sync_seconds / total, 3),
        "lookahead_used": counters.lookahead_used,
        "lookahead_wasted": counters.lookahead_wasted,
    }


def mlx_lm_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the entries of config.json that give mlx-lm as many experts per token as the command line asks for."""
    if args.experts_per_token is None:
        return {}
    config = {"num_experts_per_tok": args.experts_per_token}
    text_config = read_config(find_folder(args.model)).get("text_config")
    return {"text_config": text_config | config} if text_config else config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face repo; it must fit into memory")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0, 0.25, 0.5, 1], help="shares of all experts (default: 0 to 1)"
    )
    parser.add_argument("--prompt", default="What is a heron?")
    parser.add_argument("--turns", type=int, default=24, help="turns of each model (default: 24)")
    parser.add_argument("--turn", type=int, default=8, help="tokens per turn (default: 8)")
    parser.add_argument("--cold", action="store_true", help="read from the device, in turns of one token")
    parser.add_argument("--leave", type=parse_size, help="memory left by another process, e.g. 5GB (Linux only)")
    parser.add_argument("--experts-per-token", type=int, help="for all; of a model that calls it num_experts_per_tok")
    parser.add_argument("--lookahead", action="store_true", help="prefetch the experts that the next router may choose")
    parser.add_argument("--record", action="store_true", help="append the figures to results/decode.csv")
    args = parser.parse_args()
    if args.cold:
        # What a token brings to the page cache, the next one would find there.
        args.turn = 1

    tables, files, streaming = expert_tables(args.model), checkpoint_files(args.model), sizes(args.model)
    top_k = args.experts_per_token or streaming.experts_per_token
    bandwidth = Bandwidth.measure(Fetcher(tables, files, top_k), files, top_k)
    tokenizer = flashmoe_mlx.load(args.model, lazy=True)[1]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)

    def turns(model: nn.Module) -> Iterator[float]:
        return seconds_per_token(model, prompt, args.turn, lambda: evict(files if args.cold else []))

    baselines = {
        "mlx_lm": turns(load_resident(args.model, **mlx_lm_config(args))),
        "all_hits": turns(load_all_hits(args.model, experts_per_token=args.experts_per_token)),
    }
    for each in baselines.values():
        next(each)
    if args.leave is not None:
        # They cannot stay in memory.
        baselines = {name: repeat(median(islice(each, args.turns))) for name, each in baselines.items()}
        mx.clear_cache()
    runs: list[dict[str, Any]] = []
    mlx_lm_seconds: list[float] = []
    with nullcontext() if args.leave is None else memory_hog(args.leave):
        for budget in args.budgets:
            model = flashmoe_mlx.load(
                args.model,
                ram_budget=int(budget * streaming.experts_nbytes),
                experts_per_token=args.experts_per_token,
                config=Config(lookahead=args.lookahead),
            )[0]
            fill(model, tables)
            models = {**baselines, "streamed": turns(model)}
            rounds, counted = play(args, models, model.streaming.counters, bandwidth, len(tables))
            mlx_lm_seconds += [each.mlx_lm for each in rounds]
            run = figures(budget, rounds, counted, len(model.layers), args.turns * args.turn)
            runs.append(run)
            print(
                f"budget {budget:4.0%}: {run['tps']:6.2f} tok/s, predicted {run['predicted_tps']:6.2f}, "
                f"measured / predicted {run['measured_over_predicted']:.2f}; {run['ratio']:.2f} times mlx-lm's; "
                f"{run['hit_rate']:.1%} hits, {run['mb_per_token']} MB per token, {run['device_mb_per_token']} from "
                f"the device; {run['read_share']:.0%} of the time reading, {run['sync_share']:.0%} waiting for routers",
                flush=True,
            )
            del model, models
        lazily = mlx_lm_alone(args.model) if args.leave is not None else None
    layers = len(tables)
    common = {
        "model": Path(args.model).name,
        "layers": layers,
        "expert_mb": round(tables[0].expert_nbytes / 1e6, 2),
        "experts_per_token": top_k,
        "cold": args.cold,
        "leave_gb": args.leave and args.leave / 1e9,
        "lookahead": args.lookahead,
        "resident_tps": round(1 / median(mlx_lm_seconds), 2),
        "resident_ms_per_layer": round(1e3 * median(mlx_lm_seconds) / layers, 3),
        "device_gbps": round(bandwidth.device / 1e9, 2) if bandwidth.device < inf else None,
        "cache_gbps": round(median(bandwidth.cache) / 1e9, 2),
        "mlx_lm_lazily": lazily,
    }
    print(
        f"mlx-lm, all in memory: {common['resident_tps']:.2f} tok/s; ours, all hits: {runs[-1]['all_hits_tps']} tok/s; "
        f"fetches from the device: {common['device_gbps']} GB/s, from the page cache: {common['cache_gbps']} GB/s"
    )
    if lazily:
        print(f"mlx-lm with the memory that is left: {lazily}")
    if args.record:
        for run in runs:
            record("decode", common | run)
    print(json.dumps(common | {"runs": runs}))


if __name__ == "__main__":
    main()
