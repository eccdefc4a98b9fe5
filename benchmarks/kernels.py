"""Speed of the expert kernels on a GPU, against mlx-lm's layer and against other ways to dequantize.

    python -m benchmarks.kernels

A step is what the routed experts of a MoE layer do for one token or a few: gate, up and down products, weighted and
summed. Steps are chained, as in decoding, over slots in rotation, so that no cache serves the weights. The ways take
turns, and every figure is a median. Each is timed twice: as a call, while the host builds the next steps, and alone,
when the GPU finds all steps built. What is predicted is the time of the experts' bytes at the rate of a copy, and
``share_of_copy`` is measured / predicted speed. The last line is JSON.
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
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from benchmarks.record import record
from flashmoe_mlx.layers.switch import ResidentSwitchGLU
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import choose_backend
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.products import swiglu_experts
from flashmoe_mlx.system.package_data import data_dir

GROUP_SIZE = 64
DTYPE = mx.bfloat16
# Bytes per second of an M3 Max's memory.
M3_MAX = 400e9


class Case(NamedTuple):
    """The sizes of a step.

    Args:
        hidden (int): Width of the model.
        intermediate (int): Width of an expert.
        top_k (int): Experts per token.
        bits (int): Of the quantization.
        tokens (int): In the step.
    """

    hidden: int
    intermediate: int
    top_k: int
    bits: int
    tokens: int


# The first are those of the 397B model, with its own number of experts per token and with 4, and of the 35B model.
CASES = [
    Case(4096, 1024, 10, 4, 1),
    Case(4096, 1024, 4, 4, 1),
    Case(2048, 512, 8, 4, 1),
    Case(4096, 1024, 10, 4, 8),
    Case(4096, 1024, 10, 2, 1),
    Case(4096, 1024, 4, 2, 1),
    Case(4096, 1024, 10, 8, 1),
]

# Other ways to use a weight, as changes to kernels/quantized.metal.
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

Step = Callable[[mx.array, mx.array, mx.array], mx.array]
"""Takes ``x``, ``[tokens, hidden]``, slots and scores, ``[tokens, top_k]``; returns the next ``x``."""


def random_slab(slots: int, rows: int, columns: int, bits: int) -> Quantized:
    """Return random matrices, quantized a few at a time."""
    parts = [
        mx.quantize((mx.random.normal((4, rows, columns)) * columns**-0.5).astype(DTYPE), GROUP_SIZE, bits)
        for _ in range(slots // 4)
    ]
    weight, scales, biases = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    slab = Quantized(weight, scales, biases, GROUP_SIZE, bits)
    mx.eval(slab.arrays)
    return slab


def random_experts(slots: int, hidden: int, intermediate: int, bits: int) -> list[Quantized]:
    """Return the gate, up and down matrices of random experts."""
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return [random_slab(slots, rows, columns, bits) for rows, columns in shapes]


def switch_layer(matrices: list[Quantized]) -> SwitchGLU:
    """Return mlx-lm's layer on the same arrays."""
    switch = SwitchGLU(GROUP_SIZE, GROUP_SIZE, 1)
    for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), matrices, strict=True):
        linear = QuantizedSwitchLinear(GROUP_SIZE, GROUP_SIZE, 1, False, GROUP_SIZE, matrix.bits)
        linear.weight, linear.scales, linear.biases = matrix.arrays
        setattr(switch, name, linear)
    return switch


def weighted(experts: Callable[[mx.array, mx.array], mx.array]) -> Step:
    """Return the step of a switch layer: its output, weighted and summed as in mlx-lm's blocks."""
    return lambda x, slots, scores: (experts(x, slots) * scores[..., None]).sum(axis=-2)


def compiled(matrices: list[Quantized]) -> Step:
    """Return the step of the kernels alone."""
    gate, up, down = matrices
    step: Step = mx.compile(weighted(swiglu_experts(gate, up, down, choose_backend())))
    return step


def ablated(changes: dict[str, str], matrices: list[Quantized], sample: tuple[mx.array, mx.array, mx.array]) -> Step:
    """Return that step with another ``quantized.metal``. MLX keeps the kernels that it compiles for ``sample``."""
    step = compiled(matrices)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in data_dir("kernels").iterdir():
            (folder / path.name).write_text(path.read_text())
        text = (folder / "quantized.metal").read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "quantized.metal").write_text(text)
        gpu.compiled.cache_clear()
        with mock.patch.object(gpu, "data_dir", lambda _: folder):
            mx.eval(step(*sample))
    gpu.compiled.cache_clear()
    return step


def slots_in_rotation(slots: int, top_k: int, tokens: int, steps: int) -> list[mx.array]:
    """Return different slots for each pair of a step, ``[tokens, top_k]``, and others for the next step."""
    pairs = tokens * top_k
    numbers = [[(step * pairs + pair) * 7 % slots for pair in range(pairs)] for step in range(steps)]
    rotation = [mx.array(each, mx.uint32).reshape(tokens, top_k) for each in numbers]
    mx.eval(rotation)
    return rotation


def seconds(ways: dict[str, Step], hidden: int, rotation: list[mx.array], rounds: int = 9) -> dict[str, list[float]]:
    """Return the median times of a step of each way: as a call, and alone."""
    tokens, top_k = rotation[0].shape
    # silu(g) * u has a variance of 0.356 if g and u have 1: with these scores an output is as large as its input.
    scores = mx.full((tokens, top_k), (0.356 * top_k) ** -0.5, DTYPE)
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            x = mx.random.normal((tokens, hidden)).astype(DTYPE)
            # Not timed, because MLX may compile a kernel again whose name another had.
            mx.eval(way(x, rotation[-1], scores))
            begin = time.perf_counter()
            mx.eval(launch(way, x, rotation, scores))
            call = (time.perf_counter() - begin) / len(rotation)

            alone = seconds_alone(way, x, rotation, scores)
            # The first turn warms up.
            if turn:
                times[name].append([call, alone])
    return {name: [median(each) for each in zip(*pairs, strict=True)] for name, pairs in times.items()}


def seconds_alone(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> float:
    """Return the time of a step when all of them wait behind other work: that of 32 steps more, divided by 32."""
    few, many = (seconds_behind(way, x, rotation[:steps], scores) for steps in (8, 40))
    return (many - few) / 32


def seconds_behind(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> float:
    """Return the seconds from the end of other work to that of the last step.

    Raises:
        SystemExit: The host never gets ahead of the GPU.
    """
    for negations in (64, 128, 256):
        ahead = mx.zeros((2**28,))
        for _ in range(negations):
            ahead = -ahead
        mx.async_eval(ahead)  # type: ignore[no-untyped-call]
        last = launch(way, x, rotation, scores)
        built = time.perf_counter()
        mx.eval(ahead)
        begin = time.perf_counter()
        mx.eval(last)
        if begin - built > 5e-4:
            return time.perf_counter() - begin
    raise SystemExit("the GPU was idle before the host had built all steps: run again on a quiet machine")


def launch(way: Step, x: mx.array, rotation: list[mx.array], scores: mx.array) -> mx.array:
    """Start a chain of steps, and return its last output."""
    for step, slots in enumerate(rotation):
        x = way(x, slots, scores)
        # As in decoding, the GPU computes while the host builds what comes next.
        if step % 8 == 7:
            # Without a norm x would vanish or explode.
            x = mx.fast.rms_norm(x, None, 1e-6)
            mx.async_eval(x)  # type: ignore[no-untyped-call]
    return x


def copy_bandwidth(values: int = 2**28) -> float:
    """Return bytes per second that an elementwise kernel reads and writes, counting both, for that many float32."""
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
    """Return mlx-lm's MoE block with its own switch layer, and with the kernels. Everything else is shared."""
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
    # Everything else can be converted then.
    theirs.switch_mlp = nn.Identity()
    theirs.set_dtype(DTYPE)
    nn.quantize(theirs, GROUP_SIZE, 4)
    ours.update_modules(dict(theirs.children()))
    theirs.switch_mlp = switch_layer(matrices)
    ours.switch_mlp = ResidentSwitchGLU(switch_layer(matrices), choose_backend())
    return {"mlx-lm": theirs, "kernels": ours}


def normed(block: nn.Module) -> Step:
    """Return the step of a whole block, which routes by itself."""
    return lambda x, slots, scores: block(mx.fast.rms_norm(x, None, 1e-6))


def measure(case: Case, extras: bool) -> dict[str, list[float]]:
    """Return seconds of a step of each way in one case. ``extras`` are ablations and mlx-lm's whole block."""
    hidden, intermediate, top_k, bits, tokens = case
    print(f"{hidden}/{intermediate}, {bits} bits, {tokens} x {top_k} experts ...", file=sys.stderr)
    slots = max(64, 2 * tokens * top_k)
    matrices = random_experts(slots, hidden, intermediate, bits)
    rotation = slots_in_rotation(slots, top_k, tokens, steps=384)
    ways: dict[str, Step] = {
        "kernels": compiled(matrices),
        "drop-in": weighted(ResidentSwitchGLU(switch_layer(matrices), choose_backend())),
        "mlx-lm": weighted(switch_layer(matrices)),
    }
    if extras:
        gate, up, down = matrices
        ways["kernels, not compiled"] = weighted(swiglu_experts(gate, up, down, choose_backend()))
        sample = (mx.zeros((tokens, hidden), DTYPE), rotation[0], mx.zeros((tokens, top_k), DTYPE))
        ways |= {name: ablated(changes, matrices, sample) for name, changes in ABLATIONS.items()}
        ways |= {f"block, {name}": normed(block) for name, block in moe_blocks(matrices, top_k).items()}
    return seconds(ways, hidden, rotation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help=f"0 to {len(CASES) - 1} (default: all)"
    )
    parser.add_argument("--record", action="store_true", help="append the figures to results/kernels.csv")
    args = parser.parse_args()
    if mx.default_device().type == mx.cpu:
        sys.exit("the kernels need a GPU, and MLX found none: with one of NVIDIA's, pip install 'mlx[cuda13]'")

    copy = copy_bandwidth()
    print(f"copy: {copy / 1e12:.2f} TB/s")
    lines: list[dict[str, Any]] = []
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
                f"measured / predicted {line['share_of_copy']:.2f}, {line['times_faster']} x mlx-lm's speed; alone "
                f"{line['alone_us']} us, {line['alone_share_of_copy']:.2f}, {line['alone_times_faster']} x",
                flush=True,
            )
    if args.record:
        for line in lines:
            record("kernels", line | {"copy_tb_per_s": round(copy / 1e12, 3)})
    print(json.dumps({"copy_tb_per_s": round(copy / 1e12, 3), "lines": lines}))


if __name__ == "__main__":
    main()
