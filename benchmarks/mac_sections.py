"""Measurements of ``benchmarks.mac``: each answers one question about a machine, and returns its figures."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import psutil
from mlx_lm.generate import generate_step, generation_stream

import flashmoe_mlx
from benchmarks.checkpoints import write_checkpoint
from benchmarks.io import SIZES, UNITS, layout, write_file
from benchmarks.models import checkpoint_files, expert_tables, fill, load_all_hits, sizes
from benchmarks.page_cache import can_evict, evict
from benchmarks.trunk import DIMS, model_config
from demo import MODEL
from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.system.memory import available_memory, memory_reserve
from flashmoe_mlx.system.metal import computes_on_metal

PROMPT = list(range(2, 34))
READ_THREADS = (8, 16, 24)
MAX_MB = ("50", "1000")
"""Values of MLX_MAX_MB_PER_BUFFER: MLX's own for the larger chips, and one that slabs do not exhaust."""

# More than Metal ever allows, so that such a launch always fails, and its error names what the kernel may have.
TOO_MANY_THREADS = 2048
_LIMIT = re.compile(r"maximum allowed threads per threadgroup \((\d+)\)")

# Most threads of a threadgroup on Apple's GPUs, by the 16-bit registers of a thread: Mesa's table for M1 and M2.
REGISTERS = {
    **{1024: 104, 896: 112, 832: 128, 768: 136, 704: 144, 640: 160, 576: 184, 512: 208, 448: 232},
    384: 256,
}


class NotRun(Exception):
    """A section cannot run on this machine or in this version; the text says why."""


@dataclass(frozen=True)
class Settings:
    """Size and length of measurements.

    Args:
        folder (Path): For the checkpoint and other files.
        dims (str): A key of ``benchmarks.trunk.DIMS``.
        layers (int): Of the checkpoint.
        turns (int): Of each way.
        file_mb (int): Of the file for reads.
    """

    folder: Path
    dims: str = "397b"
    layers: int = 4
    turns: int = 24
    file_mb: int = 1000

    @classmethod
    def quick(cls, folder: Path) -> "Settings":
        """Return settings that show in a minute or two that everything runs. Their figures mean little."""
        return cls(folder, "small", 4, 4, 100)

    @property
    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint."""
        return self.folder / "checkpoint"


def setting(name: str) -> Field[Any]:
    """Return a field of Config.

    Raises:
        NotRun: This version has no such setting.
    """
    found = next((each for each in fields(Config) if each.name == name), None)
    if found is None:
        raise NotRun("not in this version")
    return found


def machine(settings: Settings) -> dict[str, Any]:
    """Return versions, and what the system says about its hardware."""
    battery = psutil.sensors_battery()
    return {
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "model": _sysctl("hw.model"),
        "chip": _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "on_battery": bool(battery and not battery.power_plugged),
        "device": mx.device_info(),
        "metal": computes_on_metal(),
        "quick": settings.dims == "small",
        "settings": {each.name: str(getattr(Config(), each.name)) for each in fields(Config)},
        "versions": {name: version(name) for name in ("flashmoe-mlx", "mlx", "mlx-lm")}
        | {"python": platform.python_version()},
    }


def checkpoint(settings: Settings) -> dict[str, Any]:
    """Write a checkpoint with layers of real size, and fewer experts if the disk has no room for 64."""
    dims = DIMS[settings.dims]
    for experts in (dims["num_experts"], dims["num_experts"] // 2, dims["num_experts"] // 4):
        weights = 3 * experts * dims["hidden_size"] * dims["moe_intermediate_size"] * settings.layers
        # 4 bits, scales and biases, and the trunk.
        needed = weights * 0.5625 + 400e6
        if (free := shutil.disk_usage(settings.folder).free) > 2 * needed:
            break
    else:
        raise NotRun(f"{free / 1e9:.1f} GB of disk are free, and {2 * needed / 1e9:.1f} are needed")
    begin = time.perf_counter()
    write_checkpoint(
        settings.checkpoint,
        model_config(dims | {"num_experts": experts}, settings.layers),
        quantization={"group_size": 64, "bits": 4},
        dtype=mx.bfloat16,
    )
    streaming = sizes(str(settings.checkpoint))
    return {
        "dims": settings.dims,
        "layers": settings.layers,
        "experts": experts,
        "experts_gb": round(streaming.experts_nbytes / 1e9, 3),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def kernel_tests(settings: Settings) -> dict[str, Any]:
    """Build every kernel and compare it with float64, as ``pytest -m metal`` does; bfloat16 apart."""
    figures = {}
    for name, chosen in (("other", "not bfloat16"), ("bfloat16", "bfloat16")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "metal", "-k", chosen]
        done = subprocess.run([*command, "tests"], capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        figures[name] = {
            "ok": done.returncode == 0,
            "result": lines[-1] if lines else done.stderr[-500:],
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        }
    return {"tests": figures}


def registers(settings: Settings) -> dict[str, Any]:
    """Return what Metal allows each kernel of the checkpoint's model, and what the kernel asks for."""
    found: dict[str, dict[str, Any]] = {}
    mx.disable_compile()
    with mock.patch.object(gpu, "compiled", probing(gpu.compiled, found)):
        _tokens(load_all_hits(str(settings.checkpoint)), 4)
    mx.enable_compile()
    if not found:
        raise NotRun("no kernel was launched")
    return {"kernels": found}


def probing(
    compiled: Callable[[gpu.Kernel], Callable[..., list[mx.array]]], found: dict[str, dict[str, Any]]
) -> Callable[[gpu.Kernel], Callable[..., list[mx.array]]]:
    """Return ``gpu.compiled`` with a probe of each kernel's limit before its first launch.

    Metal's limit depends on the registers of the compiled kernel. MLX compares it with the size of the threadgroup and
    names it in the error, without launching anything.

    Args:
        compiled (Callable): The one of ``flashmoe_mlx.ops.gpu``.
        found (dict): Gets threads asked for, threads allowed, and the registers that this implies, or the error.
    """

    def probed(kernel: gpu.Kernel) -> Callable[..., list[mx.array]]:
        launch = compiled(kernel)

        def call(**arguments: Any) -> list[mx.array]:
            template = ", ".join(f"{name}={value}" for name, value in arguments.get("template", ()))
            key, asked = f"{kernel.name}<{template}>", arguments["threadgroup"][0]
            if key not in found:
                entry: dict[str, Any] = {"threads": asked}
                try:
                    mx.eval(launch(**arguments | {"threadgroup": (TOO_MANY_THREADS, 1, 1)}))
                except (RuntimeError, ValueError) as error:
                    if limit := _LIMIT.search(str(error)):
                        allowed = int(limit[1])
                        entry |= {"allowed": allowed, "registers_16_bit": REGISTERS.get(allowed)}
                    else:
                        entry["error"] = str(error).strip().splitlines()[0][:300]
                found[key] = entry
            return launch(**arguments)

        return call

    return probed


def exact(settings: Settings) -> dict[str, Any]:
    """Compare the demo model with mlx-lm's."""
    figures, code = run_json("benchmarks.exact", "--model", str(MODEL))
    return {"exact": code == 0, "runs": figures["runs"]}


def visibility(settings: Settings) -> dict[str, Any]:
    """Write to a row of a slab while the device reads its neighbor, in the same cache line, and then read it there."""
    slab = Slab(64, (2,), mx.uint32, mx.uint32)
    stale, rounds = 0, 8 * settings.turns
    noise = mx.ones((1 << 20,))
    for number in range(rounds):
        row = number % 63
        busy = noise
        for _ in range(16):
            # Reads the row late, and again and again.
            busy = busy * 1 + slab.array[row].sum()
        mx.async_eval(busy)  # type: ignore[no-untyped-call]
        memory = slab.buffer(row + 1).cast("I")
        memory[0] = memory[1] = number + 1
        stale += (slab.array[row + 1] * 1).tolist() != [number + 1] * 2
        mx.eval(busy)
    return {"rounds": rounds, "stale": stale}


def memory(settings: Settings) -> dict[str, Any]:
    """Compare what we call available with psutil and the kernel's own figures, before and after filling the cache."""
    info = mx.device_info()
    figures: dict[str, Any] = {"before": _memory()}
    for path in checkpoint_files(str(settings.checkpoint)):
        with path.open("rb") as file:
            deque(iter(lambda: file.read(1 << 24), b""), maxlen=0)
    figures["after_reading_the_checkpoint"] = _memory()
    for name in ("max_recommended_working_set_size", "max_buffer_length"):
        if name in info:
            figures[f"{name}_gb"] = round(int(info[name]) / 1e9, 2)
    return figures | {"reserve_gb": round(memory_reserve() / 1e9, 2)}


def launches(settings: Settings) -> dict[str, Any]:
    """Measure layers with mlx-lm's code and fused, and a trivial operation."""
    x = mx.zeros((32,))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(512):
            x = x + 1
        mx.eval(x)
        seconds.append((time.perf_counter() - begin) / 512)
    run = ["--dims", settings.dims, "--layers", "2", "--contexts", "128", "--turns", "3", "--tokens", "24"]
    figures, _ = run_json("benchmarks.trunk", *run)
    return {"operation_us": round(1e6 * median(seconds), 2)} | figures


def readback(settings: Settings) -> dict[str, Any]:
    """Measure how long the host waits for a router, by MLX's event and by the way that this version prefers."""
    model = load_all_hits(str(settings.checkpoint))
    layers = [module for _, module in model.named_modules() if isinstance(module, StreamedSwitchGLU)]
    sync, counters = layers[0]._sync, model.streaming.counters
    preferred = sync._readback
    ways = {"event": None} if preferred is None else {"event": None, type(preferred).__name__: preferred}
    steps = generate_step(mx.array(PROMPT), model, max_tokens=-1)
    waits: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(settings.turns + 1):
        for name, way in ways.items():
            mx.synchronize(generation_stream)
            sync._readback = way
            begin, waited = time.perf_counter(), counters.sync_seconds
            for _ in range(4):
                next(steps)
            mx.synchronize(generation_stream)
            # The first turn warms up.
            if turn:
                waits[name].append((counters.sync_seconds - waited) / 4 / len(layers))
                tokens[name].append((time.perf_counter() - begin) / 4)
    figures = {
        name: {"wait_us_per_layer": round(1e6 * median(waits[name]), 1), "ms_per_token": _ms(tokens[name])}
        for name in ways
    }
    return {"ways": figures}


def reads(settings: Settings) -> dict[str, Any]:
    """Measure random experts of the 397B model, 10 at a time, with several numbers of reads in flight."""
    path = settings.folder / "experts"
    try:
        write_file(path, settings.file_mb * 1_000_000)
    except SystemExit as error:
        raise NotRun(str(error)) from error
    pieces = [SIZES[-1] * units // sum(UNITS) for units in UNITS]
    spans, slots = layout(path, pieces)
    readers = {threads: Reader([str(path)], threads, Counters()) for threads in READ_THREADS}
    per_batch = min(10, len(spans))
    gbps: dict[int, list[float]] = {threads: [] for threads in readers}
    cold = can_evict([path])
    for _ in range(settings.turns):
        # Each expert is read once after an eviction.
        order = random.sample(range(len(spans)), len(spans))
        if cold:
            evict([path])
        for number, threads in enumerate(random.sample(READ_THREADS, len(READ_THREADS))):
            chosen = order[number * per_batch : (number + 1) * per_batch] or order[:per_batch]
            rows = list(zip(chosen, random.sample(slots, len(chosen)), strict=True))
            pairs = [(spans[expert][part], row[part]) for part in range(len(pieces)) for expert, row in rows]
            begin = time.perf_counter()
            readers[threads].read(pairs)
            gbps[threads].append(len(chosen) * sum(pieces) / 1e9 / (time.perf_counter() - begin))
    path.unlink()
    figures = {str(threads): round(median(each), 3) for threads, each in gbps.items()}
    return {"cold": cold, "default": str(Config().read_threads), "gbps": figures}


def choices(name: str) -> Callable[[Settings], dict[str, Any]]:
    """Return the section that decodes with each value of a setting, in turns."""

    def section(settings: Settings) -> dict[str, Any]:
        field = setting(name)
        values = field.metadata.get("choices") or (False, True)
        # Kernels are compared where nothing is read; the others, where every token waits for the disk.
        all_hits = name == "kernels"
        ways = {str(value): Config().override(**{name: value}) for value in values}
        cold = not all_hits and can_evict(checkpoint_files(str(settings.checkpoint)))
        figures = compare(settings, ways, share=1 if all_hits else 0.25, cold=cold)
        return {"cold": cold, "default": str(getattr(Config(), name)), "ways": figures}

    section.__doc__ = f"Decode with each value of the setting {name}, in turns."
    return section


def compare(settings: Settings, ways: Mapping[str, Config], share: float, cold: bool) -> dict[str, dict[str, Any]]:
    """Decode the checkpoint in each way, in turns of a token if ``cold``, else of eight.

    Args:
        settings (Settings): Number of turns, and the checkpoint.
        ways (Mapping): Settings of each.
        share (float): Of experts in memory.
        cold (bool): Evict the checkpoint before each turn.
    """
    folder, turn = str(settings.checkpoint), 1 if cold else 8
    files, tables = checkpoint_files(folder), expert_tables(folder)
    budget = int(share * sizes(folder).experts_nbytes)
    models, steps, tokens = {}, {}, {}
    for name, config in ways.items():
        models[name] = flashmoe_mlx.load(folder, config=replace(config, ram_budget=budget))[0]
        fill(models[name], tables)
        steps[name] = generate_step(mx.array(PROMPT), models[name], max_tokens=-1)
        tokens[name] = [next(steps[name])[0]]
    parts: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(settings.turns + 1):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            mx.synchronize(generation_stream)
            if cold:
                evict(files)
            counters = models[name].streaming.counters
            before, begin = replace(counters), time.perf_counter()
            tokens[name] += [next(steps[name])[0] for _ in range(turn)]
            mx.synchronize(generation_stream)
            seconds = time.perf_counter() - begin
            reading = counters.read_seconds - before.read_seconds
            waiting = counters.sync_seconds - before.sync_seconds
            # The first turn warms up.
            if number:
                parts[name].append((seconds / turn, reading / turn, waiting / turn))
    first = next(iter(tokens.values()))
    figures = {}
    for name, each in parts.items():
        figures[name] = {
            "ms_per_token": _ms([total for total, _, _ in each]),
            "read_ms": _ms([reading for _, reading, _ in each]),
            "router_ms": _ms([waiting for _, _, waiting in each]),
            "other_ms": _ms([total - reading - waiting for total, reading, waiting in each]),
            "same_tokens": tokens[name] == first,
        }
    return figures


def max_mb(settings: Settings) -> dict[str, Any]:
    """Decode with all experts in memory, in new processes with and without a larger MLX_MAX_MB_PER_BUFFER."""
    program = "from benchmarks.mac_sections import decode_resident; decode_resident(*__import__('sys').argv[1:])"
    tps: dict[str, list[float]] = {value: [] for value in MAX_MB}
    for _ in range(min(3, settings.turns)):
        for value in MAX_MB:
            command = [sys.executable, "-c", program, str(settings.checkpoint), str(8 * settings.turns)]
            tps[value].append(float(_last_line(command, os.environ | {"MLX_MAX_MB_PER_BUFFER": value})))
    unset = {name: value for name, value in os.environ.items() if name != "MLX_MAX_MB_PER_BUFFER"}
    show = "import os, flashmoe_mlx; flashmoe_mlx.load; print(os.environ.get('MLX_MAX_MB_PER_BUFFER', 'unset'))"
    return {
        "default": _last_line([sys.executable, "-c", show], unset),
        "tps": {value: round(median(each), 2) for value, each in tps.items()},
    }


def decode_resident(folder: str, tokens: str) -> None:
    """Print the tokens per second of a model with all experts in memory."""
    model = flashmoe_mlx.load(folder, ram_budget=sizes(folder).experts_nbytes)[0]
    _tokens(model, 8)
    begin = time.perf_counter()
    _tokens(model, int(tokens))
    print(int(tokens) / (time.perf_counter() - begin))


def requests(settings: Settings) -> dict[str, Any]:
    """Measure the time to the first token of three requests in a row: memory must not be wired anew for each."""
    folder = str(settings.checkpoint)
    model, tokenizer = flashmoe_mlx.load(folder, ram_budget=sizes(folder).experts_nbytes)[:2]
    first_tokens = []
    for _ in range(3):
        begin = time.perf_counter()
        answer = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=8)
        next(answer)
        first_tokens.append(time.perf_counter() - begin)
        deque(answer, maxlen=0)
    return {"first_token_ms": [round(1e3 * each, 1) for each in first_tokens]}


def decode(settings: Settings) -> dict[str, Any]:
    """Compare decoding at several budgets with mlx-lm and with what bytes and bandwidth predict."""
    turns = ["--turns", str(max(2, settings.turns // 4)), "--turn", "8"]
    figures, _ = run_json(
        "benchmarks.decode", "--model", str(settings.checkpoint), "--budgets", "0", "0.25", "0.5", *turns
    )
    return figures


def run_json(module: str, *argv: str) -> tuple[dict[str, Any], int]:
    """Run a benchmark; return the JSON of its last line, and its exit code.

    Raises:
        RuntimeError: It printed no such line.
    """
    done = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), done.returncode
    except (IndexError, ValueError) as error:
        raise RuntimeError(f"{module}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}") from error


def reclaimable(vm_stat: str) -> int:
    """Return the bytes that macOS can hand out without swapping, from the output of ``vm_stat``.

    It prints free pages without the speculative ones, which are file-backed, too.
    """
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    if page is None:
        raise ValueError("vm_stat printed no page size")
    pages = dict(re.findall(r"^([A-Z][^:]*):\s+(\d+)\.$", vm_stat, re.MULTILINE))
    return int(page[1]) * sum(int(pages[name]) for name in ("Pages free", "File-backed pages", "Pages purgeable"))


def _memory() -> dict[str, Any]:
    free = psutil.virtual_memory()
    figures = {"ours_gb": available_memory() / 1e9, "psutil_gb": free.available / 1e9}
    if sys.platform == "darwin":
        figures["kernel_gb"] = reclaimable(_last_lines(["vm_stat"])) / 1e9
    pressure = _sysctl("kern.memorystatus_vm_pressure_level")
    return {name: round(value, 2) for name, value in figures.items()} | ({"pressure": pressure} if pressure else {})


def _sysctl(name: str) -> str:
    """Return a value of macOS's kernel, or nothing elsewhere."""
    return _last_lines(["sysctl", "-n", name]).strip() if sys.platform == "darwin" else ""


def _last_lines(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _last_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    return _last_lines(command, environment).strip().splitlines()[-1]


def _tokens(model: nn.Module, count: int) -> list[int]:
    return [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=count)]


def _ms(seconds: Sequence[float]) -> float:
    return round(1e3 * median(seconds), 3)


class Section(NamedTuple):
    """A measurement, and where it can run.

    Args:
        run (Callable): Takes settings and returns figures.
        seconds (int): Time after which it is ended.
        device (str): ``any``, ``gpu`` or ``metal``.
        decodes (bool): It needs the checkpoint.
    """

    run: Callable[[Settings], dict[str, Any]]
    seconds: int = 90
    device: str = "any"
    decodes: bool = True

    def refuse_elsewhere(self) -> None:
        """Refuse to run on another device.

        Raises:
            NotRun: MLX computes on another device.
        """
        if self.device == "metal" and not computes_on_metal():
            raise NotRun("needs an Apple GPU")
        if self.device == "gpu" and mx.default_device().type != mx.gpu:
            raise NotRun("needs a GPU")


# In this order, so that what matters most has run when time is over.
SECTIONS = {
    "machine": Section(machine, decodes=False),
    "checkpoint": Section(checkpoint, 180, decodes=False),
    "kernel_tests": Section(kernel_tests, 240, "gpu", decodes=False),
    "registers": Section(registers, device="metal"),
    "exact": Section(exact, decodes=False),
    "visibility": Section(visibility, decodes=False),
    "memory": Section(memory),
    "reads": Section(reads, decodes=False),
    "slots": Section(choices("slots")),
    "keep_warm": Section(choices("keep_warm"), device="metal"),
    "max_mb": Section(max_mb, 150, "metal"),
    "kernels": Section(choices("kernels"), device="gpu"),
    "lookahead": Section(choices("lookahead")),
    "readback": Section(readback),
    "requests": Section(requests),
    "launches": Section(launches, 150, decodes=False),
    "decode": Section(decode, 240),
}
