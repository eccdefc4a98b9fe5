"""Decoding speed of streaming on a CPU and of llama.cpp, in turns, on models of the same dimensions.

    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON
    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON --budget auto --leave 3GB

PYTHON is one with ``llama-cpp-python``, built for this machine, and ``gguf``; FILE is written by
``PYTHON benchmarks/gguf_model.py write FILE``. Both decode random tokens, so that routing spreads over all experts.

A run of a side begins with the page cache empty of both models, and has the memory to itself: the process is started,
decodes until it is in its stride, is measured, and ends before the other begins. With ``--leave``, another process
takes all memory but so much, and llama.cpp computes with its mapped file, of which the page cache holds what fits,
instead of a copy. What devices deliver is told for both. The last line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import flashmoe_mlx
from benchmarks.ballast import ballast
from benchmarks.io import device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.config import parse_size

_STREAM = "import sys; from benchmarks.llama import stream; stream(*sys.argv[1:])"


class Side:
    """A process that decodes as many tokens as a line of its input says, and answers with the seconds that took."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        assert self._answer() == "ready"

    def seconds(self, tokens: int) -> float:
        """The time to decode so many tokens."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return float(self._answer())

    def device_bytes(self) -> int:
        """What devices have delivered to it so far, by reads or page faults."""
        return device_bytes(self._process.pid)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a side has ended: its reason is above")
        return line.strip()


@contextmanager
def running(command: list[str]) -> Iterator[Side]:
    """A side, for as long as it is measured."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Side(process)
        finally:
            process.kill()


def stream(folder: str, budget: str) -> None:
    """Be the side of ours."""
    mx.set_default_device(mx.cpu)
    model, tokenizer = flashmoe_mlx.load(folder, ram_budget=budget)
    print(model.streaming.memory(), file=sys.stderr)
    cache, vocab, numbers = make_prompt_cache(model), len(tokenizer.vocab), random.Random(0)
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            mx.eval(model(mx.array([[numbers.randrange(vocab)]]), cache=cache))
        print(time.perf_counter() - begin, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--budget", default="auto", help="as --ram-budget (default: auto)")
    parser.add_argument("--leave", type=parse_size, help="leave so much memory to a side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="llama.cpp's")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--warm-up", type=int, default=128, help="tokens of a run that are not measured (default: 128)")
    parser.add_argument("--turns", type=int, default=10, help="that are measured in a run (default: 10)")
    parser.add_argument("--turn", type=int, default=16, help="tokens of a turn (default: 16)")
    parser.add_argument("--record", action="store_true", help="append the figures to results/llama.csv")
    args = parser.parse_args()
    mapped = args.leave is not None
    decode = [args.python, str(Path(__file__).with_name("gguf_model.py")), "decode", str(args.gguf)]
    commands = {
        "ours": [sys.executable, "-c", _STREAM, args.model, args.budget],
        "llama": [*decode, "--threads", str(args.threads), *["--mapped"] * mapped],
    }
    files = [args.gguf, *find_folder(args.model).glob("*.safetensors")]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    delivered = dict.fromkeys(commands, 0)
    for _ in range(args.rounds):
        for name, command in commands.items():
            for file in files:
                evict(file)
            with ballast(args.leave) if mapped else nullcontext(), running(command) as side:
                side.seconds(args.warm_up)
                delivered[name] -= side.device_bytes()
                turns = [side.seconds(args.turn) / args.turn for _ in range(args.turns)]
                delivered[name] += side.device_bytes()
            seconds[name] += turns
            print(f"{name}: {1 / median(turns):.2f} tok/s", file=sys.stderr, flush=True)
    tokens = args.rounds * args.turns * args.turn
    medians = {name: median(each) for name, each in seconds.items()}
    run = {
        "model": Path(args.model).name,
        "gguf_mb": round(args.gguf.stat().st_size / 1e6),
        "budget": args.budget,
        "leave_gb": args.leave and args.leave / 1e9,
        "tps": round(1 / medians["ours"], 2),
        "llama_tps": round(1 / medians["llama"], 2),
        "ratio": round(medians["llama"] / medians["ours"], 3),
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
