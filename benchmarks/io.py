"""Measures how close the reader comes to what this machine can do at all: GB/s from a file into live slots.

    python -m benchmarks.io --rounds 200
    python -m benchmarks.io --rounds 30 --cold
    python -m benchmarks.io --rounds 50 --experts 32 --neighbors

Warm reads come from the page cache. Cold ones come from the device: the file's pages are evicted before each batch, and
``device_share`` is the share of the bytes read that the device delivered, as the OS counts them.

What is predicted is the speed of a C program that makes the same reads, of a file's spans into MLX's memory, on as many
threads. Both read batches of random experts in turn, so noise hits both; with ``--neighbors`` experts that are adjacent
in the file, as prefill reads them. ``ratio`` is measured / predicted: the median of what reader and C program did one
right after the other. The last line is JSON: its first figures are those of Qwen's 1.77 MB experts in nine pieces.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.page_cache import bring, device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx.checkpoint.span import Span, Tensor
from flashmoe_mlx.config import Config
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab

# An expert with 4-bit weights, bfloat16 scales and biases in groups of 64.
UNITS = (16, 1, 1) * 3
# 0.4, 1.77 and 7.08 MB.
SIZES = tuple(unit * sum(UNITS) for unit in (7424, 32768, 131072))
# More than a CPU's cache, as in use.
SLOT_BYTES = 256_000_000

Reads = Sequence[tuple[Span, memoryview]]


def layout(path: Path, sizes: Sequence[int]) -> tuple[list[tuple[Span, ...]], list[list[memoryview]]]:
    """Return the spans of all experts whose parts have these ``sizes``, and slots to read them into.

    Each part has a tensor of its own for all experts, as in stacked checkpoints.
    """
    experts, slots = path.stat().st_size // sum(sizes), SLOT_BYTES // sum(sizes)
    tensors, slabs, offset = [], [], 0
    for nbytes in sizes:
        weight = nbytes == max(sizes)
        tensors.append(Tensor("U8", (experts, nbytes), Span(str(path), offset, experts * nbytes)))
        dtype = mx.uint32 if weight else mx.bfloat16
        slabs.append(Slab(slots, (nbytes // dtype.size,), dtype, dtype))
        offset += experts * nbytes
    spans = [tuple(tensor.block(expert, experts) for tensor in tensors) for expert in range(experts)]
    return spans, [[slab.buffer(slot) for slab in slabs] for slot in range(slots)]


def c_ceiling(folder: Path, path: Path, threads: int) -> Callable[[Reads], Callable[[], None]]:
    """Return what prepares a batch of reads in C, so that only the reads themselves are timed.

    Raises:
        OSError: There is no C compiler.
        CalledProcessError: It cannot compile the program.
    """
    source = Path(__file__).with_name("read_files.c")
    subprocess.run(["cc", "-O2", "-pthread", "-shared", "-fPIC", "-o", folder / "read_files.so", source], check=True)
    library = ctypes.CDLL(str(folder / "read_files.so"))
    library.start(threads - 1)
    file = os.open(path, os.O_RDONLY)

    def prepare(reads: Reads) -> Callable[[], None]:
        rows = [(file, s.offset, s.nbytes, ctypes.addressof(ctypes.c_char.from_buffer(b))) for s, b in reads]
        table = np.array(rows, np.int64)

        def run() -> None:
            if library.run(ctypes.c_void_p(table.ctypes.data), ctypes.c_long(len(rows))):
                raise OSError("the C program could not read: its file is damaged or gone")

        return run

    return prepare


def python_ceiling(path: Path, threads: int) -> Callable[[Reads], Callable[[], None]]:
    """Do the same without a compiler: each thread makes an equal share of the reads, and nothing else."""
    pool = ThreadPoolExecutor(threads)
    file = os.open(path, os.O_RDONLY)

    def prepare(reads: Reads) -> Callable[[], None]:
        shares: list[list[tuple[list[memoryview], int]]] = [[] for _ in range(threads)]
        for span, buffer in sorted(reads, key=lambda read: -read[0].nbytes):
            min(shares, key=lambda share: sum(b[0].nbytes for b, _ in share)).append(([buffer], span.offset))

        def make(share: list[tuple[list[memoryview], int]]) -> None:
            for buffers, offset in share:
                if os.preadv(file, buffers, offset) < buffers[0].nbytes:
                    raise OSError("the file ended before a span did")

        return lambda: list(pool.map(make, shares)).clear()

    return prepare


def compare(path: Path, sizes: Sequence[int], prepare: Any, args: argparse.Namespace) -> dict[str, float]:
    """Let reader and ceiling take turns; return the median GB/s of each, and of the ratio within a round."""
    spans, slots = layout(path, sizes)
    reader = Reader([str(path)], args.threads, Counters())

    def batch() -> Reads:
        first = random.randrange(len(spans) - args.experts + 1)
        neighbors = range(first, first + args.experts)
        experts = neighbors if args.neighbors else random.sample(range(len(spans)), args.experts)
        pairs = list(zip(experts, random.sample(slots, args.experts), strict=True))
        return [(spans[expert][part], buffers[part]) for part in range(len(sizes)) for expert, buffers in pairs]

    def reader_run(reads: Reads) -> Callable[[], None]:
        return lambda: reader.read(reads)

    nbytes = args.experts * sum(sizes)
    sides = {"reader_gbps": reader_run, "ceiling_gbps": prepare}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    delivered = 0
    for number in range(args.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            reads = batch()
            run = sides[name](reads)
            if args.cold:
                evict([path])
                delivered -= device_bytes()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            if args.cold:
                delivered += device_bytes()
            if number < 2:
                check(path, reads)
    gbps = {name: nbytes / 1e9 / median(each) for name, each in seconds.items()}
    ratio = median(c / r for r, c in zip(seconds["reader_gbps"], seconds["ceiling_gbps"], strict=True))
    figures = gbps | {"ratio": ratio, "device_share": delivered / (2 * args.rounds * nbytes)}
    return {name: round(value, 3) for name, value in figures.items()}


def check(path: Path, reads: Reads) -> None:
    """Refuse bytes that are not the file's. The slots are cleared, so that the next check cannot see them."""
    with path.open("rb") as file:
        for span, buffer in reads:
            file.seek(span.offset)
            if file.read(span.nbytes) != buffer:
                raise SystemExit(f"wrong bytes from offset {span.offset}")
            buffer[:] = bytes(span.nbytes)


def write_file(path: Path, nbytes: int) -> None:
    """Write random bytes, which are then on disk and in the page cache."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if shutil.disk_usage(path.parent).free < 2 * nbytes or memory < 2 * (nbytes + 2 * SLOT_BYTES):
        raise SystemExit(f"not enough disk or memory for a file of {nbytes / 1e6:.0f} MB that stays in the page cache")
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, nbytes, 1 << 24):
            file.write(generator.bytes(min(1 << 24, nbytes - begin)))
        os.fsync(file.fileno())
    bring([path])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, default=Config().read_threads, help="of the reader (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=200, help="batches of each (default: %(default)s)")
    parser.add_argument("--size", type=int, default=800, help="MB of the file (default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, default=10, help="experts of a batch; a layer's in a decode step (default: %(default)s)"
    )
    parser.add_argument("--neighbors", action="store_true", help="adjacent experts, as in prefill")
    parser.add_argument("--cold", action="store_true", help="read from the device")
    parser.add_argument("--record", action="store_true", help="append the figures to results/io.csv")
    args = parser.parse_args()
    if not 0 < args.experts <= SLOT_BYTES // max(SIZES):
        parser.error(f"--experts is {args.experts}: it must be 1 to {SLOT_BYTES // max(SIZES)}, which fit in the slots")
    # As many as copy in the reader.
    threads = args.threads if args.cold else min(args.threads, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "experts"
        write_file(path, args.size * 1_000_000)
        try:
            prepare, ceiling = c_ceiling(folder, path, threads), "c"
        except (OSError, subprocess.CalledProcessError):
            prepare, ceiling = python_ceiling(path, threads), "python"
        print(f"expert MB  layout      reader GB/s  {ceiling + ' GB/s':>12}  measured / predicted  from the device")
        runs: list[dict[str, Any]] = []
        for size in SIZES:
            pieces = [size * units // sum(UNITS) for units in UNITS]
            for kind, sizes in (("scattered", pieces), ("contiguous", [size])):
                figures = compare(path, sizes, prepare, args)
                runs.append({"expert_mb": round(size / 1e6, 2), "layout": kind} | figures)
                print("{:9}  {:10}  {:11.2f}  {:12.2f}  {:20.2f}  {:15.0%}".format(*runs[-1].values()), flush=True)
    if args.record:
        for run in runs:
            # The column's name, as earlier lines have it.
            batch = {"experts": args.experts, "neighbours": args.neighbors}
            record("io", run | batch | {"cold": args.cold, "ceiling": ceiling, "threads": args.threads})
    first = next(r for r in runs if (r["expert_mb"], r["layout"]) == (1.77, "scattered"))
    chosen = {key: first[key] for key in ("reader_gbps", "ceiling_gbps", "ratio")}
    print(json.dumps(chosen | {"ceiling": ceiling, "threads": args.threads, "runs": runs}))


if __name__ == "__main__":
    main()
