"""Decoding speed of streaming on a CPU and of llama.cpp, in turns, on models of the same dimensions.

    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON
    python -m benchmarks.llama --model FOLDER --gguf FILE --python PYTHON --budget auto --leave 3GB

PYTHON has ``llama-cpp-python``, built for this machine, and ``gguf``; FILE is written by
``PYTHON benchmarks/gguf_model.py write FILE``. Both decode random tokens, so that routing spreads over all experts.

Runs alternate between the two. Each begins with neither model in the page cache, and has the memory to itself: the
process is started, decodes until its speed is steady, is measured, and ends before the next begins. With ``--leave``,
another process takes all memory but that much, and llama.cpp computes with its mapped file, of which the page cache
holds what fits, instead of a copy. The bytes that devices deliver are counted for both. Nothing is predicted: ``ratio``
compares with llama.cpp. The last line is JSON.
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
from benchmarks.memory_hog import memory_hog
from benchmarks.models import checkpoint_files
from benchmarks.page_cache import device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx.config import parse_size

_STREAM = "import sys; from benchmarks.llama import stream; stream(*sys.argv[1:])"


class Side:
    """A process that decodes as many tokens as a line of its input says, and writes the seconds that this took.

    Args:
        process (subprocess.Popen): It writes ``ready`` first.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        assert self._answer() == "ready"

    def seconds(self, tokens: int) -> float:
        """Return the time to decode that many tokens."""
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        return float(self._answer())

    def device_bytes(self) -> int:
        """Return the bytes that devices have delivered to it, by reads or page faults."""
        return device_bytes(self._process.pid)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a process that decodes has ended: its reason is above")
        return line.strip()


def usable_cores() -> int:
    """Return the cores that this process may use; on a Mac, which cannot restrict a process, all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def running(command: list[str]) -> Iterator[Side]:
    """Run a side while it is measured."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Side(process)
        finally:
            process.kill()


def stream(folder: str, budget: str) -> None:
    """Decode on our side, as standard input asks."""
    mx.set_default_device(mx.cpu)
    model, tokenizer = flashmoe_mlx.load(folder, ram_budget=budget)[:2]
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
    parser.add_argument("--model", required=True, help="our model: folder or Hugging Face repo")
    parser.add_argument("--gguf", required=True, type=Path, help="llama.cpp's model")
    parser.add_argument("--python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--budget", default="auto", help="memory for experts, as for --ram-budget (default: auto)")
    parser.add_argument("--leave", type=parse_size, help="memory left to each, e.g. 3GB")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of llama.cpp (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=128, help="tokens before each run (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="turns of a run (default: %(default)s)")
    parser.add_argument("--turn", type=int, default=16, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the figures to results/llama.csv")
    args = parser.parse_args()
    mapped = args.leave is not None
    decode = [args.python, str(Path(__file__).with_name("gguf_model.py")), "decode", str(args.gguf)]
    commands = {
        "ours": [sys.executable, "-c", _STREAM, args.model, args.budget],
        "llama": [*decode, "--threads", str(args.threads), *["--mapped"] * mapped],
    }
    files = [args.gguf, *checkpoint_files(args.model)]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    delivered = dict.fromkeys(commands, 0)
    for number in range(args.rounds):
        for name in sorted(commands, reverse=bool(number % 2)):
            evict(files)
            with memory_hog(args.leave) if mapped else nullcontext(), running(commands[name]) as side:
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
