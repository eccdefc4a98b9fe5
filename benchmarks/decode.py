"""Decoding speed of mlx-lm with all experts in memory, and of streaming at several budgets, on the same checkpoint.

    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 1
    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 --cold
    python -m benchmarks.decode --model FOLDER --budgets 0 0.25 --leave 5GB

The two take turns of a few tokens, so that a machine that slows down slows both; ratios are of neighbouring turns, and
everything is a median. Budgets are shares of all experts. Cold, the page cache is emptied of the checkpoint before each
token. With ``--leave``, another process takes all memory but so much; mlx-lm is measured before, and its own way to run
a model that is larger than memory is tried as well.

``predicted_tps`` is what bytes explain: mlx-lm's time with all in memory, and all bytes that were read, at the rate at
which the reader brings random experts from the device or, for what that did not deliver, from the page cache. The last
line is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream

import flashmoe_mlx
from benchmarks.ballast import ballast
from benchmarks.exact import load_resident
from benchmarks.io import device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx.checkpoint.folder import find_folder, read_config
from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.config import Config, parse_size
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader

_MLX_LM = """
import sys, time
from pathlib import Path
Path("/proc/self/oom_score_adj").write_text("1000")
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


def read_rate(files: list[Path], expert_nbytes: int, experts: int, cold: bool) -> float:
    """Bytes a second at which the reader brings experts, in nine pieces each, from the device or the page cache."""
    pieces = [expert_nbytes * unit // 54 for unit in (16, 1, 1) * 3]
    buffers = [memoryview(bytearray(piece)) for piece in pieces * experts]
    reader = Reader(map(str, files), Config().read_threads, Counters())
    rates = []
    for _ in range(24):
        reads = []
        for buffer in buffers:
            file = random.choice(files)
            reads.append(
                (Span(str(file), random.randrange(file.stat().st_size - buffer.nbytes), buffer.nbytes), buffer)
            )
        if cold:
            for file in files:
                evict(file)
        else:
            reader.read(reads)
        begin = time.perf_counter()
        reader.read(reads)
        rates.append(sum(buffer.nbytes for buffer in buffers) / (time.perf_counter() - begin))
    return median(rates)


def mlx_lm_alone(folder: str, seconds: int = 240) -> str:
    """How mlx-lm's own lazy loading fares with the memory that is left: what becomes of its first eight tokens."""
    command = [sys.executable, "-c", _MLX_LM, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no eight tokens in {seconds} s"
    if done.returncode < 0:
        return f"killed (signal {-done.returncode})"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    first, *_, last = (float(line.split()[1]) for line in done.stdout.splitlines())
    return f"first token after {first:.1f} s, then {7 / (last - first):.2f} tok/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 0.25, 0.5, 1])
    parser.add_argument("--prompt", default="What is a heron?")
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--turn", type=int, default=8, help="tokens a turn (default: 8)")
    parser.add_argument("--cold", action="store_true", help="read from the disk (Linux only): turns of a single token")
    parser.add_argument("--leave", type=parse_size, help="memory left by another process, e.g. 5GB (Linux only)")
    parser.add_argument("--experts-per-token", type=int, help="for both; of a model that calls it num_experts_per_tok")
    parser.add_argument("--lookahead", action="store_true", help="read ahead what the next router may choose")
    parser.add_argument("--record", action="store_true", help="append the figures to results/decode.csv")
    args = parser.parse_args()

    files = list(find_folder(args.model).glob("*.safetensors"))
    if args.cold:
        args.turn = 1  # what the page cache learns in a turn, it knows

    def before_turn() -> None:
        for file in files if args.cold else []:
            evict(file)

    streamed, tokenizer = flashmoe_mlx.load(args.model)
    streaming = streamed.streaming
    expert_nbytes, top_k = streaming.pools[0].expert_nbytes, args.experts_per_token or streaming.experts_per_token
    layers = len(streamed.layers)
    full = Path(tempfile.mkdtemp()) / "residents.json"  # pools begin full, as they are after a while
    tables = [m._table for m in streamed.modules() if isinstance(m, StreamedSwitchGLU)]
    full.write_text(json.dumps({"experts": {table.layer: list(range(table.experts)) for table in tables}}))
    del streamed
    rates = {name: read_rate(files, expert_nbytes, top_k, name == "device") for name in ("device", "cache")}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)
    config: dict[str, Any] = {}
    if args.experts_per_token is not None:
        config = {"num_experts_per_tok": top_k}
        if text_config := read_config(find_folder(args.model)).get("text_config"):
            config = {"text_config": text_config | config}
    resident = load_resident(args.model, **config)
    theirs = seconds_per_token(resident, prompt, args.turn, before_turn)
    resident_seconds = [next(theirs) for _ in range(args.turns // 2)][1:]
    if args.leave is not None:
        del resident, theirs
        mx.clear_cache()
    runs: list[dict[str, Any]] = []
    with nullcontext() if args.leave is None else ballast(args.leave):
        for budget in args.budgets:
            streamed, _ = flashmoe_mlx.load(
                args.model,
                ram_budget=int(budget * streaming.experts_nbytes),
                experts_per_token=args.experts_per_token,
                config=Config(lookahead=args.lookahead, warm_start=str(full)),
            )
            counters = streamed.streaming.counters
            ours = seconds_per_token(streamed, prompt, args.turn, before_turn)
            next(ours)  # warm up
            before, delivered = replace(counters), device_bytes()
            pairs = []
            for _ in range(args.turns):
                pairs.append((next(theirs) if args.leave is None else median(resident_seconds), next(ours)))
            delivered = device_bytes() - delivered
            after = {name: value - getattr(before, name) for name, value in vars(counters).items()}
            routed = after["hits"] + after["misses"]
            tokens, our_seconds = args.turns * args.turn, args.turn * sum(pair[1] for pair in pairs)
            if args.leave is None:
                resident_seconds += [pair[0] for pair in pairs]
            cached = max(0, after["bytes_read"] - delivered)
            predicted = median(pair[0] for pair in pairs)
            predicted += (delivered / rates["device"] + cached / rates["cache"]) / tokens
            run = {
                "budget": budget,
                "ms_per_layer": round(1e3 * median(pair[1] for pair in pairs) / layers, 3),
                "tps": round(1 / median(pair[1] for pair in pairs), 2),
                "ratio": round(median(a / b for a, b in pairs), 3),
                "predicted_tps": round(1 / predicted, 2),
                "hit_rate": round(after["hits"] / routed, 3) if routed else 1.0,
                "mb_per_token": round(after["bytes_read"] / 1e6 / tokens, 2),
                "device_mb_per_token": round(delivered / 1e6 / tokens, 2),
                "read_share": round(after["read_seconds"] / our_seconds, 3),
                "sync_share": round(after["sync_seconds"] / our_seconds, 3),
                "lookahead_used": after["lookahead_used"],
                "lookahead_wasted": after["lookahead_wasted"],
            }
            runs.append(run)
            print(
                f"budget {budget:4.0%}: {run['tps']:6.2f} tok/s (bytes predict {run['predicted_tps']}), "
                f"{run['ms_per_layer']} ms a layer, {run['ratio']:.3f} of mlx-lm's, {run['hit_rate']:.1%} hits, "
                f"{run['mb_per_token']} MB a token, {run['device_mb_per_token']} from the device; "
                f"{run['read_share']:.0%} of the time in reads, {run['sync_share']:.0%} waiting for routers",
                flush=True,
            )
            del streamed, ours
        lazily = mlx_lm_alone(args.model) if args.leave is not None else None
    common = {
        "model": Path(args.model).name,
        "layers": layers,
        "expert_mb": round(expert_nbytes / 1e6, 2),
        "experts_per_token": top_k,
        "cold": args.cold,
        "leave_gb": args.leave and args.leave / 1e9,
        "lookahead": args.lookahead,
        "resident_tps": round(1 / median(resident_seconds), 2),
        "resident_ms_per_layer": round(1e3 * median(resident_seconds) / layers, 3),
        "device_gbps": round(rates["device"] / 1e9, 2),
        "cache_gbps": round(rates["cache"] / 1e9, 2),
        "mlx_lm_lazily": lazily,
    }
    print(
        f"mlx-lm, all in memory: {common['resident_tps']:.2f} tok/s; device: {common['device_gbps']} GB/s, page cache: "
        f"{common['cache_gbps']}"
    )
    if lazily:
        print(f"mlx-lm with the memory that is left: {lazily}")
    if args.record:
        for run in runs:
            record("decode", common | run)
    print(json.dumps(common | {"runs": runs}))


if __name__ == "__main__":
    main()
