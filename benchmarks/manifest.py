"""Cost of comparing experts with a manifest when they are read for the first time, from a cold page cache (Linux only).

    python -m benchmarks.checkpoints FOLDER --layers 4 --hidden 2048 --intermediate 512
    python -m benchmarks.manifest --model FOLDER --rounds 20

A round fetches the same experts into a pool twice, in the batches of a decode step: with a manifest and without, and
in the next round in the other order. Before each the checkpoint is evicted from the page cache, and every expert is
new. What is predicted is no cost, because one expert is hashed while the device delivers others. The last line is JSON:
``ratio`` is measured / predicted, the median of seconds with the manifest over seconds without it in the same round;
``ratio_low`` and ``ratio_high`` are the quartiles; ``device_share`` is the share of bytes that the device delivered.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from benchmarks.models import expert_tables
from benchmarks.page_cache import device_bytes, evict
from benchmarks.record import record
from flashmoe_mlx import verify
from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.checkpoint.manifest import Manifest
from flashmoe_mlx.config import Config
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader

Batches = Sequence[tuple[ExpertTable, Sequence[int]]]


def batches(tables: Sequence[ExpertTable], experts: int, count: int) -> Batches:
    """Return batches of random experts of one layer after the other, none of them twice."""
    orders = [random.sample(range(table.experts), table.experts) for table in tables]
    starts = range(0, min(count, *(table.experts for table in tables)), experts)
    return [(table, order[i : i + experts]) for i in starts for table, order in zip(tables, orders, strict=True)]


def seconds(checkpoint: Checkpoint, reader: Reader, steps: Batches, check: ManifestCheck | None) -> float:
    """Return the seconds that fetches take, into slots that were written to before."""
    table, experts = steps[0]
    pool = Pool(len(experts), table, reader, Counters(), None, check)
    evict(map(Path, checkpoint.files))
    begin = time.perf_counter()
    for table, experts in steps:
        pool.fetch(table, experts)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face repo, all of whose layers look alike")
    parser.add_argument("--rounds", type=int, default=20, help="fetches of each (default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, default=10, help="experts of a batch; a layer's in a decode step (default: %(default)s)"
    )
    parser.add_argument(
        "--most", type=int, default=100, help="experts of each layer that a round reads (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=Config().read_threads, help="of the reader (default: %(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="append the figures to results/manifest.csv")
    args = parser.parse_args()
    checkpoint = Checkpoint(find_folder(args.model))
    tables = expert_tables(args.model)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "manifest.json"
        verify.main([args.model, "--sample", "0", "--write-manifest", str(file)])
        manifest = Manifest.load(file, checkpoint)
    reader = Reader(checkpoint.files, args.threads, Counters())
    each: dict[bool, list[float]] = {False: [], True: []}
    delivered = nbytes = 0
    for number in range(args.rounds + 1):
        steps = batches(tables, args.experts, args.most)
        for checked in sorted(each, reverse=bool(number % 2)):
            before = device_bytes()
            taken = seconds(checkpoint, reader, steps, ManifestCheck(manifest, tables) if checked else None)
            # The first round starts threads and touches memory.
            if number > 0:
                each[checked].append(taken)
                delivered += device_bytes() - before
                nbytes += sum(table.expert_nbytes * len(experts) for table, experts in steps)
    low, ratio, high = quantiles([b / a for a, b in zip(each[False], each[True], strict=True)], n=4)
    gbps = nbytes / 2 / 1e9 / sum(each[False])
    figures = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "gbps": gbps, "device_share": delivered / nbytes}
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(f"measured / predicted seconds {ratio:.3f}, quartiles {low:.3f} to {high:.3f}; {gbps:.2f} GB/s without")
    figures |= {"expert_mb": round(tables[0].expert_nbytes / 1e6, 2), "experts": args.experts, "rounds": args.rounds}
    if args.record:
        record("manifest", {"model": Path(args.model).name} | figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
