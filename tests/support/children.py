"""Run commands in child processes that are interrupted or killed, and tell how each of them ended.

Children are new processes and not forks, because Metal does not work in a forked one. Each runs this file:

    python -m tests.support.children WORK ARGUMENTS PIPE
"""

import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

import benchmarks.record
from flashmoe_mlx import cache_prompt
from flashmoe_mlx.cli.interrupts import exit_on_interrupt
from flashmoe_mlx.generation.prompt_cache import save_prompt_cache
from flashmoe_mlx.streaming.warm_start import save_residents
from flashmoe_mlx.system.atomic_write import replacing

TEXT = ["--prompt", "What is a heron?", "--max-tokens", "150"]
MANUAL = ["--prompt", "The heron stands in shallow water and waits. " * 12, "--prefill-step-size", "16"]


Report = Callable[[], None]
"""Tells the parent that a child has made progress."""


def child(out: Path, work: str, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a child that works, with its output in files.

    Args:
        out (Path): The files are ``out.out`` and ``out.err``.
        work (str): A name in ``WORKS``.
        arguments (str): Of that function.

    Returns:
        tuple: (the process, the read end of a pipe to which it writes its progress).
    """
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "tests.support.children", work, json.dumps(arguments), str(write_end)]
    with open(f"{out}.out", "wb") as stdout, open(f"{out}.err", "wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, pass_fds=[write_end])
    os.close(write_end)
    return process, read_end


def wait_for(started: tuple[subprocess.Popen[bytes], int]) -> int:
    """Return the exit code of a child, or minus the signal that ended it."""
    process, pipe = started
    code = process.wait()
    os.close(pipe)
    return code


def run_command(report: Report, module: str, *argv: str) -> None:
    """Run a command, and report when it starts and when it has ended."""
    run = importlib.import_module(f"flashmoe_mlx.{module}")
    parser = run.setup_arg_parser
    run.setup_arg_parser = lambda: (report(), parser())[1]
    run.main(list(argv))
    report()


def write_again_and_again(report: Report, folder: str, kind: str) -> None:
    """Write a file until the process is killed, and report each time."""
    _, write = writers(Path(folder))[kind]
    for number in range(10**9):
        write(number)
        report()


def write_once(report: Report, folder: str) -> None:
    """Write a file of each kind."""
    for _, write in writers(Path(folder)).values():
        write(0)


def write_to_a_full_disk(report: Report, folder: str, kind: str) -> None:
    """Write a file with space, without, and with space again; print what is there as JSON."""
    path, write = writers(Path(folder))[kind]
    write(1)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write(2)
        error = ""
    except OSError as failure:
        error = str(failure)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    same = path.read_bytes() == before
    left = unfinished(Path(folder))
    write(3)
    print(json.dumps({"error": error, "same": same, "left": left, "changed": path.read_bytes() != before}))


def save_to_a_full_disk(report: Report, *argv: str) -> None:
    """Save a prompt cache without space."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    cache_prompt.main(list(argv))


WORKS: dict[str, Callable[..., None]] = {
    work.__name__: work
    for work in (run_command, write_again_and_again, write_once, write_to_a_full_disk, save_to_a_full_disk)
}


def interrupt(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Send Ctrl-C at a random moment of a generation or of saving a prompt cache."""
    cases = {
        "generate": ("generate", ["--model", model, *TEXT]),
        "silent": ("generate", ["--model", model, *TEXT, "--verbose", "False"]),
        "cache_prompt": ("cache_prompt", ["--model", model, *MANUAL, "--prompt-cache-file", str(folder / "manual")]),
    }
    runs, lasts = [], {}
    for trial in range(-len(cases), count):
        name = list(cases)[trial % len(cases)]
        (folder / "manual.safetensors").write_text("old")
        module, argv = cases[name]
        process, pipe = started = child(folder / "log", "run_command", module, *argv)
        os.read(pipe, 1)
        begin = time.monotonic()
        # The first run of each case is not interrupted. It shows the whole output and how long it takes.
        if trial < 0:
            os.read(pipe, 1)
            lasts[name] = time.monotonic() - begin
        else:
            time.sleep(random.uniform(0, 1.05 * lasts[name]))
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
        code = wait_for(started)
        seconds = time.monotonic() - begin
        manual = (folder / "manual.safetensors").read_bytes()
        runs.append(
            {
                "case": name,
                "code": code,
                "seconds": seconds,
                "out": (folder / "log.out").read_text(errors="replace"),
                "err": (folder / "log.err").read_text(),
                "manual": "old" if manual == b"old" else "new" if len(mx_names(manual)) else "mix",
                "left": unfinished(folder),
            }
        )
    return runs


def mx_names(content: bytes) -> list[str]:
    """Return the names of the tensors of a safetensors file, or none if it is not complete."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max(entry["data_offsets"][1] for entry in tensors.values())
    return list(tensors) if len(content) == 8 + length + end else []


def writers(folder: Path) -> dict[str, tuple[Path, Callable[[int], None]]]:
    """Return each kind of file that the project writes, with a function that writes it with a given content."""

    class Residents:
        def __init__(self, number: int):
            self.residents = [("layer", number)] * 5000

    def prompt_cache(number: int) -> None:
        cache = KVCache()
        layer = mx.full((1, 2, 256, 64), float(number))
        cache.update_and_fetch(layer, layer)
        save_prompt_cache(folder / "manual.safetensors", [cache], {"number": str(number)})

    def csv(number: int) -> None:
        benchmarks.record.RESULTS = folder
        benchmarks.record._commit = lambda: "0"
        benchmarks.record._machine = lambda: "machine"
        benchmarks.record.record("figures", {"number": number, "text": "x" * 2000})

    def config(number: int) -> None:
        with replacing(folder / "config.json") as unfinished:
            unfinished.write_text(json.dumps([number] * 5000))

    return {
        "residents": (folder / "residents.json", lambda n: save_residents(folder / "residents.json", [Residents(n)])),
        "prompt cache": (folder / "manual.safetensors", prompt_cache),
        "csv": (folder / "figures.csv", csv),
        "config": (folder / "config.json", config),
    }


def whole(kind: str, content: bytes) -> bool:
    """Return whether a file is one of those written, and not a part or a mix."""
    if kind == "prompt cache":
        length = int.from_bytes(content[:8], "little")
        words = np.frombuffer(content[8 + length :], np.float32)
        # Keys and values, and one word for the number of their tokens.
        count = 2 * 2 * 256 * 64
        return len(mx_names(content)) == 3 and words.size == count + 1 and len(np.unique(words)) == 2
    if kind == "csv":
        lines = content.decode().splitlines()
        return content.endswith(b"\n") and all(line.count(",") == lines[0].count(",") for line in lines)
    numbers = json.loads(content)
    if kind == "residents":
        numbers = numbers["experts"]["layer"]
    return len(numbers) == 5000 and len(set(numbers)) == 1


def unfinished(folder: Path) -> list[str]:
    """Return the names of the unfinished files in a folder."""
    return sorted(each.name for each in folder.iterdir() if "unfinished" in each.name)


def kill(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Send SIGKILL at a random moment of writing a file again and again."""
    runs = []
    for trial in range(count):
        kind, (path, _) = list(writers(folder).items())[trial % 4]
        process, pipe = started = child(folder / "log", "write_again_and_again", str(folder), kind)
        # It has written once.
        os.read(pipe, 1)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        code = wait_for(started)
        good = whole(kind, path.read_bytes())
        path.unlink()
        runs.append({"kind": kind, "code": code, "whole": good, "left": unfinished(folder)})
    # Every writer also sweeps unfinished files.
    wait_for(child(folder / "log", "write_once", str(folder)))
    return [*runs, {"kind": "all", "code": -signal.SIGKILL, "whole": True, "left": unfinished(folder)}]


def disk_full(folder: Path, model: str) -> list[dict[str, Any]]:
    """Let each writer run out of disk space, and try again with space."""
    runs = []
    for kind in writers(folder):
        code = wait_for(child(folder / "log", "write_to_a_full_disk", str(folder), kind))
        error = (folder / "log.err").read_text()
        runs.append({"kind": kind, "code": code, "err": error} | json.loads((folder / "log.out").read_text() or "{}"))
    argv = ["--model", model, *MANUAL, "--prompt-cache-file", str(folder / "full")]
    code = wait_for(child(folder / "log", "save_to_a_full_disk", *argv))
    left = [each.name for each in folder.iterdir() if "full" in each.name]
    return [*runs, {"kind": "command", "code": code, "err": (folder / "log.err").read_text(), "left": left}]


def together(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Run several processes on one model, one warm-start file and one prompt cache."""
    shared = ["--model", model, "--warm-start", str(folder / "residents.json"), "--ram-budget", "1MB"]
    cases = [
        ("generate", [*shared, *TEXT, "--verbose", "False"]),
        ("cache_prompt", [*shared, *MANUAL, "--prompt-cache-file", str(folder / "manual")]),
    ] * count
    children = [
        child(folder / f"log{number}", "run_command", module, *argv) for number, (module, argv) in enumerate(cases)
    ]
    codes = [wait_for(each) for each in children]
    manual = mx_names((folder / "manual.safetensors").read_bytes())
    return [
        {
            "code": code,
            "out": (folder / f"log{number}.out").read_text(errors="replace"),
            "err": (folder / f"log{number}.err").read_text(),
            "manual": len(manual),
            "residents": list(json.loads((folder / "residents.json").read_text())),
        }
        for number, code in enumerate(codes)
    ]


def main() -> None:
    """Work as the command line says."""
    work, arguments, pipe = sys.argv[1:]
    # As Command.run() does.
    exit_on_interrupt()
    WORKS[work](lambda: os.write(int(pipe), b"."), *json.loads(arguments))


if __name__ == "__main__":
    main()
