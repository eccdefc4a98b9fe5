"""Speed of the native CPU kernels against the rate at which the same machine reads memory.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --model FOLDER

Kernels multiply with matrices that no cache holds: slots rotate through slabs of twice the last cache, or of 240 MB.
Calls that read 100 MB in all are launched together, as a model's operations follow each other, and timed from Python
until the results are there. What counts is the bytes of weights, scales and biases that they need. What is predicted is
the speed of a C program that adds up the same number of bytes in the same kind of memory on the same number of threads.
The two take turns; figures are medians, the C program's of all its turns in a case, and ``ratio`` is measured /
predicted. MLX's own operation is timed on the same operands, with scales in float32 because it is several times slower
with others. The last line is JSON.

With ``--model``, a model decodes with all experts in memory, in turns with the C program, which reads as many bytes as
a token needs of weights, and with the products of a token alone, one after another, of experts that change from token
to token. ``weights_share`` is the part of a token's time that the C program takes, so it is measured / predicted, and
no faster kernel saves it. ``products_share`` is the part that the products take: only faster kernels save it.
"""

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import flashmoe_mlx
from benchmarks.decode import seconds_per_token
from benchmarks.models import expert_tables, sizes
from benchmarks.record import record
from flashmoe_mlx.config import parse_size
from flashmoe_mlx.layers.fused_decoder import FusedDecoderLayer
from flashmoe_mlx.layers.projections import matrix_of
from flashmoe_mlx.layers.qwen3_next import PROJECTIONS
from flashmoe_mlx.ops import native
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.products import gate_up, linear, matvec, swiglu_experts
from flashmoe_mlx.ops.routing import router_and_shared
from flashmoe_mlx.system.huge_pages import use_huge_pages

TURN_NBYTES = 100e6


class Case(NamedTuple):
    """The sizes of a layer's experts.

    Args:
        hidden (int): Width of the model.
        intermediate (int): Width of an expert.
        top_k (int): Experts per token.
        bits (int): Of the quantization.
        group_size (int): Of the quantization.
    """

    hidden: int
    intermediate: int
    top_k: int
    bits: int
    group_size: int


# The first are those of the 397B model and of the 35B model.
CASES = [
    Case(4096, 1024, 10, 4, 64),
    Case(2048, 512, 8, 4, 64),
    Case(4096, 1024, 10, 2, 64),
    Case(4096, 1024, 10, 3, 64),
    Case(4096, 1024, 10, 6, 64),
    Case(4096, 1024, 10, 8, 64),
    Case(4096, 1024, 10, 4, 32),
    Case(4096, 1024, 10, 4, 128),
]


@cache
def slab_nbytes() -> int:
    """Return a size that no cache of this machine holds."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(240_000_000, *(2 * parse_size(f"{size.read_text().strip()}iB") for size in sizes))


def memory_reader(folder: Path) -> Callable[[int, int], float]:
    """Return a function of bytes and threads that reads them in C, and returns the seconds that it took."""
    source = Path(__file__).with_name("read_memory.c")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", folder / "read_memory.so", source], check=True)
    # Its threads sleep while others have their turn.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    library = ctypes.CDLL(str(folder / "read_memory.so"))
    library.read_all.restype = ctypes.c_uint64
    memory = mx.ones((slab_nbytes() // 2,), mx.uint32)
    mx.eval(memory)
    use_huge_pages(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memoryview(memory).cast("B")))  # type: ignore[arg-type]
    begins = count()

    def seconds(nbytes: int, threads: int) -> float:
        nbytes = min(nbytes, memory.nbytes) // 64 * 64
        places = memory.nbytes // nbytes
        begin = time.perf_counter()
        library.read_all(
            ctypes.c_void_p(address + next(begins) % places * nbytes), ctypes.c_size_t(nbytes // 8), threads
        )
        return time.perf_counter() - begin

    return seconds


def random_slab(rows: int, columns: int, bits: int, group_size: int, dtype: mx.Dtype) -> Quantized:
    """Return matrices that no cache holds, whose quantized weights are random bits."""
    row_nbytes = columns * bits // 8 + 2 * dtype.size * columns // group_size
    slots = slab_nbytes() // (rows * row_nbytes) + 1
    words = np.random.default_rng(0).integers(0, 2**32, (slots, rows, columns * bits // 32), np.uint32)
    scales = mx.full((slots, rows, columns // group_size), 2.0 ** (1 - bits) * columns**-0.5, dtype)
    slab = Quantized(mx.array(words), scales, scales * (0.5 - 2 ** (bits - 1)), group_size, bits)
    for part in slab.arrays:
        mx.eval(part)
        use_huge_pages(part)
    return slab


def rotating(slots: int, top_k: int) -> Iterator[mx.array]:
    """Yield slots of one token after the other, ``[1, top_k]``, so that each is used again after all others."""
    for first in count(step=top_k):
        yield mx.array([[(first + k) % slots for k in range(top_k)]], mx.uint32)


def timed(call: Callable[[], mx.array], calls: int = 1) -> float:
    begin = time.perf_counter()
    mx.eval([call() for _ in range(calls)])
    return time.perf_counter() - begin


def nbytes_of(matrix: Quantized, matrices: int) -> int:
    return sum(part.nbytes for part in matrix.arrays) // matrix.weight.shape[0] * matrices


def measure(case: Case, rounds: int, reader: Callable[[int, int], float]) -> Iterator[dict[str, Any]]:
    """Yield the figures of each kernel at one case, with one thread and with all."""
    hidden, intermediate, top_k, bits, group_size = case
    kernels = native.require()
    gate, up = (random_slab(intermediate, hidden, bits, group_size, mx.bfloat16) for _ in range(2))
    down = random_slab(hidden, intermediate, bits, group_size, mx.bfloat16)
    x = mx.random.normal((1, hidden))
    h = mx.random.normal((1, top_k, intermediate))
    mx.eval(x, h)
    slots = rotating(gate.weight.shape[0], top_k)
    # One matrix, such as an output head.
    weight, scales, biases = (part.flatten(0, 1) for part in gate.arrays)
    head = Quantized(weight, scales, biases, group_size, bits)
    hidden_of, output_of, project = gate_up.on(Backend.NATIVE), matvec.on(Backend.NATIVE), linear.on(Backend.NATIVE)
    runs: dict[str, tuple[Callable[[], mx.array], int]] = {
        "gate_up": (lambda: hidden_of(x, next(slots), gate, up), 2 * nbytes_of(gate, top_k)),
        "matvec": (lambda: output_of(h, next(slots), down), nbytes_of(down, top_k)),
        "linear": (lambda: project(x, head), sum(part.nbytes for part in head.arrays)),
    }
    for threads in sorted({1, all_threads := kernels.threads()}):
        kernels.set_threads(threads)
        ours: dict[str, float] = {}
        ceilings = []
        for name, (call, nbytes) in runs.items():
            calls = ceil(TURN_NBYTES / nbytes)
            nbytes *= calls
            # Warm up.
            timed(call, calls), reader(nbytes, threads)
            pairs = [(reader(nbytes, threads), timed(call, calls)) for _ in range(rounds)]
            ceilings += [nbytes / seconds / 1e9 for seconds, _ in pairs]
            ours[name] = nbytes / median(seconds for _, seconds in pairs) / 1e9
        ceiling = median(ceilings)
        for name, gbps in ours.items():
            yield {
                "kernel": name,
                "hidden": hidden,
                "intermediate": intermediate,
                "experts": top_k,
                "bits": bits,
                "group_size": group_size,
                "threads": threads,
                "mb": round(runs[name][1] / 1e6, 1),
                "gbps": round(gbps, 2),
                "read_gbps": round(ceiling, 2),
                "ratio": round(gbps / ceiling, 3),
            }
    kernels.set_threads(all_threads)


def mlx_gbps(case: Case) -> float:
    """Return GB/s of MLX's own operation on the gate matrices of a case."""
    hidden, intermediate, top_k, bits, group_size = case
    gate = random_slab(intermediate, hidden, bits, group_size, mx.float32)
    x = mx.random.normal((1, 1, hidden))
    slots = rotating(gate.weight.shape[0], top_k)
    seconds = median(timed(lambda: matvec.reference(x, next(slots), gate)) for _ in range(3))
    return nbytes_of(gate, top_k) / seconds / 1e9


def products(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Yield the products of a token, as the fused layers of a model make them, each of a random vector."""
    project, ask = linear.on(Backend.NATIVE), router_and_shared.on(Backend.NATIVE)

    def random_vector(matrix: Quantized) -> mx.array:
        x = mx.random.normal((1, 1, matrix.scales.shape[-1] * matrix.group_size))
        mx.eval(x)
        return x

    def product(linears: list[nn.Module]) -> Callable[[], mx.array]:
        matrix = _joined(linears)
        x = random_vector(matrix)
        return lambda: project(x, matrix)

    def router(block: nn.Module) -> Callable[[], tuple[mx.array, mx.array]]:
        matrix = _joined([block.gate, block.shared_expert_gate])
        gate, up = (_joined([block.shared_expert[name]]) for name in ("gate_proj", "up_proj"))
        x = random_vector(matrix)
        return lambda: ask(x, matrix, gate, up)

    def experts(switch: nn.Module, top_k: int) -> Callable[[], mx.array]:
        gate, up, down = map(matrix_of, (switch.gate_proj, switch.up_proj, switch.down_proj))
        compute, chosen = swiglu_experts(gate, up, down, Backend.NATIVE), rotating(gate.weight.shape[0], top_k)
        x = random_vector(gate)
        return lambda: compute(x, next(chosen)[None])

    for layer in model.layers:
        if not isinstance(layer, FusedDecoderLayer):
            raise SystemExit("--model needs fused decoder layers: choose a Qwen3.5-MoE or a Qwen3-Next in 4 bits")
        mixer, block = (layer.linear_attn if layer.is_linear else layer.self_attn), layer.mlp
        names, output = next(names for kind, names in PROJECTIONS.items() if isinstance(mixer, kind))
        yield product([mixer[name] for name in names])
        yield product([mixer[output]])
        yield router(block)
        yield product([block.shared_expert.down_proj])
        yield experts(block.switch_mlp.switch, block.top_k)
    yield product([model.language_model.lm_head])


def _joined(linears: list[nn.Module]) -> Quantized:
    """Copy linear layers into one matrix of all their rows."""
    weight, scales, biases = (
        mx.concatenate([linear[name] for linear in linears]) for name in ("weight", "scales", "biases")
    )
    matrix = Quantized(weight, scales, biases, linears[0].group_size, linears[0].bits)
    for part in matrix.arrays:
        mx.eval(part)
        use_huge_pages(part)
    return matrix


def weights_share(folder: str, turns: int, reader: Callable[[int, int], float], turn: int = 8) -> dict[str, Any]:
    """Return the parts of a token's time that reading its weights, and its products, take by themselves."""
    streaming = sizes(folder)
    experts = sum(table.expert_nbytes for table in expert_tables(folder)) * streaming.experts_per_token
    model, tokenizer = flashmoe_mlx.load(folder, ram_budget=streaming.experts_nbytes)[:2]
    trunk = streaming.trunk_nbytes
    parameters = dict(tree_flatten(model.parameters()))
    # Without a head the embedding is one.
    if any("lm_head" in name for name in parameters):
        trunk -= sum(array.nbytes for name, array in parameters.items() if "embed_tokens" in name)
    nbytes = trunk + experts
    threads = native.require().threads()
    seconds = seconds_per_token(model, tokenizer.encode("What is a heron?"), turn, lambda: None)
    calls = list(products(model))

    def seconds_of_products() -> float:
        begin = time.perf_counter()
        for _ in range(turn):
            mx.eval([call() for call in calls])
        return (time.perf_counter() - begin) / turn

    # Warm up.
    next(seconds), reader(nbytes, threads), seconds_of_products()
    rounds = [(reader(nbytes, threads), next(seconds), seconds_of_products()) for _ in range(turns)]
    return {
        "model": Path(folder).name,
        "threads": threads,
        "trunk_mb": round(trunk / 1e6, 1),
        "experts_mb": round(experts / 1e6, 1),
        "tps": round(1 / median(token for _, token, _ in rounds), 2),
        "read_gbps": round(nbytes / median(read for read, _, _ in rounds) / 1e9, 2),
        "weights_share": round(median(read / token for read, token, _ in rounds), 3),
        "products_share": round(median(made / token for _, token, made in rounds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help=f"0 to {len(CASES) - 1} (default: all)"
    )
    parser.add_argument("--model", help="measure the tokens of this model instead")
    parser.add_argument("--record", action="store_true", help="append the figures to results/cpu.csv or cpu_share.csv")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit("the native kernels are not built: install a C++20 compiler and run pip install again")

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        reader = memory_reader(Path(folder))
        if args.model:
            share = weights_share(args.model, args.rounds, reader)
            if args.record:
                record("cpu_share", share)
            print(
                f"{share['tps']} tok/s; measured / predicted {share['weights_share']:.2f} from the bytes of weights, "
                f"{share['products_share']:.2f} from the products alone"
            )
            print(json.dumps(share))
            return
        for number in args.cases:
            print(f"{kernels.instruction_set()}, {CASES[number]}; MLX's own: {mlx_gbps(CASES[number]):.2f} GB/s")
            for run in measure(CASES[number], args.rounds, reader):
                runs.append({"instruction_set": kernels.instruction_set(), **run})
                print(
                    f"  {run['kernel']:8} {run['threads']:3} threads: {run['gbps']:6.2f} GB/s of "
                    f"{run['read_gbps']:6.2f} predicted, measured / predicted {run['ratio']:.2f}",
                    flush=True,
                )
                if args.record:
                    record("cpu", runs[-1])
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
