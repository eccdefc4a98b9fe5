"""Runs commands in children that are interrupted or killed, and prints as JSON how each of them ended.

    python -m tests.support.forks interrupt|kill|disk_full|together FOLDER MODEL COUNT

A program of its own: what has computed with MLX must not fork.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

import benchmarks.record
from flashmoe_mlx import cache_prompt, generate
from flashmoe_mlx.cli.interrupts import leave_on_interrupt
from flashmoe_mlx.generation.prompt_cache import save_prompt_cache
from flashmoe_mlx.streaming.warm_start import save_residents
from flashmoe_mlx.system.atomic_write import replacing

TEXT = ["--prompt", "What is a heron?", "--max-tokens", "150"]
MANUAL = ["--prompt", "The heron stands in shallow water and waits. " * 12, "--prefill-step-size", "16"]


def child(work: Callable[[Callable[[], None]], Any], out: Path) -> tuple[int, int]:
    """Fork; the child works, with its output in files. Returns its number and a pipe that it tells its progress to."""
    ear, mouth = os.pipe()
    sys.stdout.flush()
    if number := os.fork():
        os.close(mouth)
        return number, ear
    os.close(ear)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    leave_on_interrupt()  # as a command does that begins
    work(lambda: os.write(mouth, b".") and None)
    sys.exit(0)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def command(module: Any, argv: list[str]) -> Callable[[Callable[[], None]], None]:
    """A command that tells when it has begun and when it is over."""

    def work(tell: Callable[[], None]) -> None:
        parser = module.setup_arg_parser
        module.setup_arg_parser = lambda: (tell(), parser())[1]
        module.main(argv)
        tell()

    return work


def interrupt(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Ctrl-C at a random moment of a generation or of saving a prompt cache."""
    cases = {
        "generate": (generate, ["--model", model, *TEXT]),
        "silent": (generate, ["--model", model, *TEXT, "--verbose", "False"]),
        "cache_prompt": (cache_prompt, ["--model", model, *MANUAL, "--prompt-cache-file", str(folder / "manual")]),
    }
    runs, lasts = [], {}
    for trial in range(-len(cases), count):
        name = list(cases)[trial % len(cases)]
        (folder / "manual.safetensors").write_text("old")
        begin = time.monotonic()
        number, ear = child(command(*cases[name]), folder / "log")
        os.read(ear, 1)
        if trial < 0:  # the first of each is left alone, to know what it says and how long it takes
            os.read(ear, 1)
            lasts[name] = time.monotonic() - begin
        else:
            time.sleep(random.uniform(0, 1.05 * lasts[name]))
            begin = time.monotonic()
            os.kill(number, signal.SIGINT)
        code = ended(number)
        seconds = time.monotonic() - begin
        os.close(ear)
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
    """The tensors of a complete safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max(entry["data_offsets"][1] for entry in tensors.values())
    return list(tensors) if len(content) == 8 + length + end else []


def writers(folder: Path) -> dict[str, tuple[Path, Callable[[int], None]]]:
    """Every kind of file that the project writes, and what writes it with a given content."""

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
    """Whether a file is one that was written, and not a part or a mix."""
    if kind == "prompt cache":
        length = int.from_bytes(content[:8], "little")
        words = np.frombuffer(content[8 + length :], np.float32)
        count = 2 * 2 * 256 * 64  # keys and values, and one word that tells how many tokens they are of
        return len(mx_names(content)) == 3 and words.size == count + 1 and len(np.unique(words)) == 2
    if kind == "csv":
        lines = content.decode().splitlines()
        return content.endswith(b"\n") and all(line.count(",") == lines[0].count(",") for line in lines)
    numbers = json.loads(content)
    if kind == "residents":
        numbers = numbers["experts"]["layer"]
    return len(numbers) == 5000 and len(set(numbers)) == 1


def unfinished(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if "unfinished" in each.name)


def kill(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """SIGKILL at a random moment of writing a file again and again."""
    runs = []
    for trial in range(count):
        kind, (path, write) = list(writers(folder).items())[trial % 4]

        def work(tell: Callable[[], None], write: Callable[[int], None] = write) -> None:
            for number in range(10**9):
                write(number)
                tell()

        number, ear = child(work, folder / "log")
        os.read(ear, 1)  # it has written once
        time.sleep(random.uniform(0, 0.02))
        os.kill(number, signal.SIGKILL)
        code = ended(number)
        os.close(ear)
        good = whole(kind, path.read_bytes())
        path.unlink()
        runs.append({"kind": kind, "code": code, "whole": good, "left": unfinished(folder)})
    for _, write in writers(folder).values():
        ended(child(lambda _, write=write: write(0), folder / "log")[0])  # and sweeps
    return [*runs, {"kind": "all", "code": -signal.SIGKILL, "whole": True, "left": unfinished(folder)}]


def disk_full(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """No more room after some bytes: what each writer says, and what is there then and after another try."""
    runs = []
    for kind, (path, write) in writers(folder).items():

        def work(tell: Callable[[], None], write: Callable[[int], None] = write, path: Path = path) -> None:
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
            left = unfinished(folder)
            write(3)
            print(json.dumps({"error": error, "same": same, "left": left, "changed": path.read_bytes() != before}))

        number, ear = child(work, folder / "log")
        code = ended(number)
        os.close(ear)
        error = (folder / "log.err").read_text()
        runs.append({"kind": kind, "code": code, "err": error} | json.loads((folder / "log.out").read_text() or "{}"))
    argv = ["--model", model, *MANUAL, "--prompt-cache-file", str(folder / "full")]

    def save(tell: Callable[[], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        cache_prompt.main(argv)

    number, ear = child(save, folder / "log")
    code = ended(number)
    os.close(ear)
    left = [each.name for each in folder.iterdir() if "full" in each.name]
    return [*runs, {"kind": "command", "code": code, "err": (folder / "log.err").read_text(), "left": left}]


def together(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Several processes on one model, one warm-start file and one prompt cache."""
    shared = ["--model", model, "--warm-start", str(folder / "residents.json"), "--ram-budget", "1MB"]
    cases = [
        (generate, [*shared, *TEXT, "--verbose", "False"]),
        (cache_prompt, [*shared, *MANUAL, "--prompt-cache-file", str(folder / "manual")]),
    ] * count
    children = [child(command(*case), folder / f"log{number}") for number, case in enumerate(cases)]
    codes = [ended(number) for number, _ in children]
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
    what, folder, model, count = sys.argv[1:]
    random.seed(0)
    runs = {"interrupt": interrupt, "kill": kill, "disk_full": disk_full, "together": together}
    print(json.dumps(runs[what](Path(folder), model, int(count))))


if __name__ == "__main__":
    main()
