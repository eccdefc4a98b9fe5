"""Speed of the expert kernels on a GPU, against mlx-lm's layer and against other ways to dequantise.

    python -m benchmarks.kernels

A step is what a MoE layer's routed experts do for one token or a few: gate, up and down products, weighted and summed.
Steps are chained, as in decoding, over slots in rotation, so that no cache serves the weights. The ways take turns, and
every figure is a median. Each is timed twice: as a call, while the host builds the next steps, and alone, when the GPU
finds all steps built. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from benchmarks.record import record
from flashmoe_mlx.layers.switch import ResidentSwitchGLU
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.system.package_data import data_dir

GROUP_SIZE = 64
DTYPE = mx.bfloat16
M3_MAX = 400e9  # bytes a second

# hidden, intermediate, experts a token, bits, tokens: those of the 397B model first
CASES = [
    (4096, 1024, 10, 4, 1),
    (4096, 1024, 4, 4, 1),
    (2048, 512, 8, 4, 1),
    (4096, 1024, 10, 4, 8),
    (4096, 1024, 10, 2, 1),
    (4096, 1024, 4, 2, 1),
    (4096, 1024, 10, 8, 1),
]

# Other ways to use a weight, as changes to kernels/quantized.metal.
_FMA = "dot = fma(float(q), x[i], dot);"
_EXTRACTED = {"return 8 % BITS == 0 ? i * BITS % 8 : 0;": "return 0;", "    if (8 % BITS == 0) {": "    if (false) {"}
_SCALED = _EXTRACTED | {
    "  float dot = 0.0f;\n": """
  const float scale = float(scales[block * BLOCK / GROUP]);
  const float bias = float(biases[block * BLOCK / GROUP]);
  float dot = 0.0f;
""",
    "return fma(float(scales[group]), dot, float(biases[group]) * sum);": "return dot;",
}
ABLATIONS = {
    "q shifted to the right": _EXTRACTED,
    "fma(q, scale*x, bias*x)": _SCALED
    | {"dot = fma(float(q), x[i], dot);": "dot += fma(float(q), scale * x[i], bias * x[i]);"},
    "(q*scale + bias)*x": _SCALED | {"dot = fma(float(q), x[i], dot);": "dot += (float(q) * scale + bias) * x[i];"},
}

Step = Callable[[mx.array, mx.array, mx.array], mx.array]  # (x, slots, scores) -> the next x


def random_slab(slots: int, rows: int, columns: int, bits: int) -> Quantized:
    """Random experts, made a few at a time."""
    parts = [
        mx.quantize((mx.random.normal((4, rows, columns)) * columns**-0.5).astype(DTYPE), GROUP_SIZE, bits)
        for _ in range(slots // 4)
    ]
    slab = Quantized(*(mx.concatenate(part) for part in zip(*parts, strict=True)), GROUP_SIZE, bits)
    mx.eval(slab[:3])
    return slab


def random_experts(slots: int, hidden: int, intermediate: int, bits: int) -> list[Quantized]:
    """Their gate, up and down matrices."""
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return [random_slab(slots, rows, columns, bits) for rows, columns in shapes]


def switch_layer(matrices: list[Quantized]) -> SwitchGLU:
    """mlx-lm's layer on the same arrays."""
    switch = SwitchGLU(GROUP_SIZE, GROUP_SIZE, 1)
    for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), matrices, strict=True):
        linear = QuantizedSwitchLinear(GROUP_SIZE, GROUP_SIZE, 1, False, GROUP_SIZE, matrix.bits)
        linear.weight, linear.scales, linear.biases = matrix[:3]
        setattr(switch, name, linear)
    return switch


def weighted(layer: nn.Module) -> Step:
    """A switch layer, and what mlx-lm's blocks do with its output."""
    return lambda x, slots, scores: (layer(x, slots) * scores[..., None]).sum(axis=-2)


def summed(matrices: list[Quantized]) -> Step:
    """The kernels with the weighted sum in the second launch."""
    gate, up, down = matrices
    return lambda x, slots, scores: ops.down(ops.gate_up(x, slots, gate, up), slots, scores, down)


def ablated(changes: dict[str, str], matrices: list[Quantized], sample: tuple[mx.array, mx.array, mx.array]) -> Step:
    """The same with another ``quantized.metal``; MLX keeps the kernels that it compiles for ``sample``."""
    step = mx.compile(summed(matrices))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in data_dir("kernels").iterdir():
            (folder / path.name).write_text(path.read_text())
        text = (folder / "quantized.metal").read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "quantized.metal").write_text(text)
        gpu.kernel.cache_clear()
        with mock.patch.object(gpu, "data_dir", lambda _: folder):
            step(*sample)
    gpu.kernel.cache_clear()
    return step


def slots_in_rotation(slots: int, top_k: int, tokens: int, steps: int) -> list[mx.array]:
    """Different slots for each pair of a step, ``[tokens, top_k]``, and others for the next step."""
    pairs = tokens * top_k
    numbers = [[(step * pairs + pair) * 7 % slots for pair in range(pairs)] for step in range(steps)]
    rotation = [mx.array(each, mx.uint32).reshape(tokens, top_k) for each in numbers]
    mx.eval(rotation)
    return rotation


def seconds(ways: dict[str, Step], hidden: int, rotation: list[mx.array], rounds: int = 9) -> dict[str, list[float]]:
    """The median times of a step of each way: as a call, and alone."""
    tokens, top_k = rotation[0].shape
    # silu(g) * u has a variance of 0.356 if g and u have 1: with these scores an output is as large as its input.
    scores = mx.full((tokens, top_k), (0.356 * top_k) ** -0.5, DTYPE)
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            x = mx.random.normal((tokens, hidden)).astype(DTYPE)
            mx.eval(way(x, rotation[-1], scores))  # untimed: MLX may compile a kernel again whose name another had
            begin = time.perf_counter()
            mx.eval(launch(way, x, rotation, scores))
            call = (time.perf_counter() - begin) / len(rotation)

            alone = seconds_alone(way, x, rotation, scores)
            if turn:  # the first warms up
                times[name].append([call, alone])
    return {name: [median(each) for each in zip(*pairs, strict=True)] for name, pairs in times.items()}


def seconds_alone(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> float:
    """The time of a step when all of them wait behind other work: what 32 steps more take."""
    few, many = (seconds_behind(way, x, rotation[:steps], scores) for steps in (8, 40))
    return (many - few) / 32


def seconds_behind(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> float:
    """How long after other work the last step ends. Raises SystemExit if the host never gets ahead of the GPU."""
    for negations in (64, 128, 256):
        ahead = mx.zeros((2**28,))
        for _ in range(negations):
            ahead = -ahead
        mx.async_eval(ahead)
        last = launch(way, x, rotation, scores)
        built = time.perf_counter()
        mx.eval(ahead)
        begin = time.perf_counter()
        mx.eval(last)
        if begin - built > 5e-4:
            return time.perf_counter() - begin
    raise SystemExit("the GPU was idle before all steps were built, however much other work it had first")


def launch(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> mx.array:
    """Start a chain of steps; its last output."""
    for step, slots in enumerate(rotation):
        x = way(x, slots, scores)
        if step % 8 == 7:  # as decoding does: the GPU computes while the host builds what comes next
            x = mx.fast.rms_norm(x, None, 1e-6)  # or x would vanish or explode after some more
            mx.async_eval(x)
    return x


def copy_bandwidth(values: int = 2**28) -> float:
    """Bytes a second that a plain elementwise kernel reads and writes, counting both, for so many values."""
    big = mx.zeros((values,))
    times = []
    for _ in range(9):
        mx.eval(big)
        begin = time.perf_counter()
        copy = big
        for _ in range(16):
            copy = -copy
        mx.eval(copy)
        times.append((time.perf_counter() - begin) / 16)
    nbytes = big.nbytes
    del big, copy
    mx.clear_cache()
    return 2 * nbytes / median(times)


def moe_blocks(matrices: list[Quantized], top_k: int) -> dict[str, nn.Module]:
    """mlx-lm's MoE block with its own switch layer, and with the kernels; all else is shared."""
    slots, intermediate, _ = matrices[0].weight.shape
    args = SimpleNamespace(
        hidden_size=matrices[2].rows,
        moe_intermediate_size=intermediate,
        shared_expert_intermediate_size=intermediate,
        norm_topk_prob=True,
        num_experts=slots,
        num_experts_per_tok=top_k,
    )
    theirs, ours = Qwen3NextSparseMoeBlock(args), Qwen3NextSparseMoeBlock(args)
    theirs.switch_mlp = nn.Identity()  # so that all else can be converted
    theirs.set_dtype(DTYPE)
    nn.quantize(theirs, GROUP_SIZE, 4)
    ours.update_modules(dict(theirs.children()))
    theirs.switch_mlp, ours.switch_mlp = switch_layer(matrices), ResidentSwitchGLU(switch_layer(matrices))
    return {"mlx-lm": theirs, "kernels": ours}


def measure(case: tuple[int, int, int, int, int], extras: bool) -> dict[str, list[float]]:
    """Seconds of a step of each way in one case; ``extras`` are ablations and mlx-lm's whole block."""
    hidden, intermediate, top_k, bits, tokens = case
    print(f"{hidden}/{intermediate}, {bits} bits, {tokens} x {top_k} experts ...", file=sys.stderr)
    slots = max(64, 2 * tokens * top_k)
    matrices = random_experts(slots, hidden, intermediate, bits)
    rotation = slots_in_rotation(slots, top_k, tokens, steps=384)
    ways = {
        "kernels": mx.compile(summed(matrices)),
        "drop-in": weighted(ResidentSwitchGLU(switch_layer(matrices))),
        "mlx-lm": weighted(switch_layer(matrices)),
    }
    if extras:
        ways["kernels, not compiled"] = summed(matrices)
        sample = (mx.zeros((tokens, hidden), DTYPE), rotation[0], mx.zeros((tokens, top_k), DTYPE))
        ways |= {name: ablated(changes, matrices, sample) for name, changes in ABLATIONS.items()}
        for name, block in moe_blocks(matrices, top_k).items():
            ways[f"block, {name}"] = lambda x, slots, scores, block=block: block(mx.fast.rms_norm(x, None, 1e-6))
    return seconds(ways, hidden, rotation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="which, from 0 on")
    parser.add_argument("--record", action="store_true", help="append the figures to results/kernels.csv")
    args = parser.parse_args()
    if mx.default_device().type == mx.cpu:
        sys.exit("kernels run on a GPU, and MLX has none here. On Linux: pip install 'mlx[cuda13]'")

    copy = copy_bandwidth()
    print(f"copy: {copy / 1e12:.2f} TB/s")
    lines = []
    for number in args.cases:
        hidden, intermediate, top_k, bits, tokens = CASES[number]
        nbytes = 3 * tokens * top_k * hidden * intermediate * (bits / 8 + 2 * DTYPE.size / GROUP_SIZE)
        times = measure(CASES[number], extras=number == 0)
        for way, (call, alone) in times.items():
            theirs = times["block, mlx-lm" if way.startswith("block") else "mlx-lm"]
            line = {
                "hidden": hidden,
                "intermediate": intermediate,
                "top_k": top_k,
                "bits": bits,
                "tokens": tokens,
                "way": way,
                "us": round(call * 1e6, 1),
                "alone_us": round(alone * 1e6, 1),
                "mb": round(nbytes / 1e6, 1),
                "tb_per_s": round(nbytes / call / 1e12, 2),
                "share_of_copy": round(nbytes / call / copy, 3),
                "alone_share_of_copy": round(nbytes / alone / copy, 3),
                "times_faster": round(theirs[0] / call, 2),
                "alone_times_faster": round(theirs[1] / alone, 2),
                "m3_max_us": round(nbytes / M3_MAX * 1e6, 1),
            }
            lines.append(line)
            print(
                f"{hidden}/{intermediate}, {bits} bits, {tokens} x {top_k} experts, {way}: {line['us']} us a call, "
                f"{line['share_of_copy']:.0%} of copy, {line['times_faster']} x mlx-lm's speed; alone "
                f"{line['alone_us']} us, {line['alone_share_of_copy']:.0%}, {line['alone_times_faster']} x",
                flush=True,
            )
    if args.record:
        for line in lines:
            record("kernels", line | {"copy_tb_per_s": round(copy / 1e12, 3)})
    print(json.dumps({"copy_tb_per_s": round(copy / 1e12, 3), "lines": lines}))


if __name__ == "__main__":
    main()
