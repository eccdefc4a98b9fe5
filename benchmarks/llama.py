"""Decoding speed of streaming on a CPU and of llama.cpp, in turns, on models of the same dimensions.

    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON
    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON --budget 0.25 --leave 3GB

PYTHON is one with ``llama-cpp-python``, built for this machine, and ``gguf``; FILE is written by
``PYTHON benchmarks/gguf_model.py write FILE``. Both decode random tokens, so that routing spreads over all experts.
With ``--leave``, another process takes all memory but so much, and llama.cpp computes with its mapped file, of which
the page cache holds what fits, instead of a copy. What devices deliver is told for both. The last line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import flashmoe_mlx
from benchmarks.ballast import ballast
from benchmarks.record import record
from flashmoe_mlx.config import parse_size


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, file: Path, threads: int, mapped: bool):
        script = str(Path(__file__).with_name("gguf_model.py"))
        command = [python, script, "decode", str(file), "--threads", str(threads), *["--mapped"] * mapped]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "ready"

    def seconds(self, tokens: int) -> float:
        """The time to decode so many tokens."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return float(self._answer())

    def device_bytes(self) -> int:
        return device_bytes(self._process.pid)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("llama.cpp has ended: its reason is above")
        return line.strip()


class Streaming:
    """Our model."""

    def __init__(self, folder: str, budget: float):
        model, tokenizer = flashmoe_mlx.load(folder)
        if budget:
            nbytes = model.streaming.experts_nbytes
            del model
            model, tokenizer = flashmoe_mlx.load(folder, ram_budget=int(budget * nbytes))
        self.model, self._vocab = model, len(tokenizer.vocab)
        self._random = random.Random(0)
        self._cache = make_prompt_cache(model)
        self.seconds(16)

    def seconds(self, tokens: int) -> float:
        """The time to decode so many tokens."""
        begin = time.perf_counter()
        for _ in range(tokens):
            mx.eval(self.model(mx.array([[self._random.randrange(self._vocab)]]), cache=self._cache))
        return time.perf_counter() - begin

    def device_bytes(self) -> int:
        return device_bytes(os.getpid())


def device_bytes(pid: int) -> int:
    """What devices have delivered to a process so far, by reads or page faults."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--budget", type=float, default=1, help="share of the experts in memory (default: 1)")
    parser.add_argument("--leave", type=parse_size, help="leave so much memory to both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="llama.cpp's")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--record", action="store_true", help="append the figures to results/llama.csv")
    args = parser.parse_args()

    mapped = args.leave is not None
    with ballast(args.leave) if mapped else nullcontext():
        sides = {
            "ours": Streaming(args.model, args.budget),
            "llama": LlamaCpp(args.python, args.gguf, args.threads, mapped),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        delivered = {name: -side.device_bytes() for name, side in sides.items()}
        for _ in range(args.turns):
            for name, side in sides.items():
                seconds[name].append(side.seconds(args.turn) / args.turn)
        delivered = {name: delivered[name] + side.device_bytes() for name, side in sides.items()}
        sides["llama"].end()
    tokens = args.turns * args.turn
    run = {
        "model": Path(args.model).name,
        "gguf_mb": round(args.gguf.stat().st_size / 1e6),
        "budget": args.budget,
        "leave_gb": args.leave and args.leave / 1e9,
        "tps": round(1 / median(seconds["ours"]), 2),
        "llama_tps": round(1 / median(seconds["llama"]), 2),
        "ratio": round(median(b / a for a, b in zip(seconds["ours"], seconds["llama"], strict=True)), 3),
        "device_mb_per_token": round(delivered["ours"] / tokens / 1e6, 2),
        "llama_device_mb_per_token": round(delivered["llama"] / tokens / 1e6, 2),
    }
    print(
        f"{run['tps']} tok/s, llama.cpp {run['llama_tps']}: ratio {run['ratio']}; from the device "
        f"{run['device_mb_per_token']} MB a token, llama.cpp {run['llama_device_mb_per_token']}"
    )
    if args.record:
        record("llama", run)
    print(json.dumps(run))


if __name__ == "__main__":
    main()
