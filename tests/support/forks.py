"""Run commands in child processes that are interrupted or killed, and print as JSON how each of them ended.

    python -m tests.support.forks interrupt|kill|disk_full|together FOLDER MODEL COUNT

It is a program of its own because a process must not fork after it has computed with MLX.
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
from flashmoe_mlx.cli.interrupts import exit_on_interrupt
from flashmoe_mlx.generation.prompt_cache import save_prompt_cache
from flashmoe_mlx.streaming.warm_start import save_residents
from flashmoe_mlx.system.atomic_write import replacing

TEXT = ["--prompt", "What is a heron?", "--max-tokens", "150"]
MANUAL = ["--prompt", "The heron stands in shallow water and waits. " * 12, "--prefill-step-size", "16"]


def child(work: Callable[[Callable[[], None]], Any], out: Path) -> tuple[int, int]:
    """Fork a child that works, with its output in files.

    Returns:
        tuple: (its process id, the read end of a pipe to which it writes its progress).
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    if number := os.fork():
        os.close(write_end)
        return number, read_end
    os.close(read_end)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # As Command.run() does.
    exit_on_interrupt()
    work(lambda: os.write(write_end, b".") and None)
    sys.exit(0)


def wait_for(number: int) -> int:
    """Return the exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def command(module: Any, argv: list[str]) -> Callable[[Callable[[], None]], None]:
    """Return work that runs a command, and reports when it starts and when it has ended."""

    def work(report: Callable[[], None]) -> None:
        parser = module.setup_arg_parser
        module.setup_arg_parser = lambda: (report(), parser())[1]
        module.main(argv)
        report()

    return work


def interrupt(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Send Ctrl-C at a random moment of a generation or of saving a prompt cache."""
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
        number, pipe = child(command(*cases[name]), folder / "log")
        os.read(pipe, 1)
        # The first run of each case is not interrupted. It shows the whole output and how long it takes.
        if trial < 0:
            os.read(pipe, 1)
            lasts[name] = time.monotonic() - begin
        else:
            time.sleep(random.uniform(0, 1.05 * lasts[name]))
            begin = time.monotonic()
            os.kill(number, signal.SIGINT)
        code = wait_for(number)
        seconds = time.monotonic() - begin
        os.close(pipe)
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
        kind, (path, write) = list(writers(folder).items())[trial % 4]

        def work(report: Callable[[], None], write: Callable[[int], None] = write) -> None:
            for number in range(10**9):
                write(number)
                report()

        number, pipe = child(work, folder / "log")
        # It has written once.
        os.read(pipe, 1)
        time.sleep(random.uniform(0, 0.02))
        os.kill(number, signal.SIGKILL)
        code = wait_for(number)
        os.close(pipe)
        good = whole(kind, path.read_bytes())
        path.unlink()
        runs.append({"kind": kind, "code": code, "whole": good, "left": unfinished(folder)})
    # Every writer also sweeps unfinished files.
    for _, write in writers(folder).values():
        wait_for(child(lambda _, write=write: write(0), folder / "log")[0])
    return [*runs, {"kind": "all", "code": -signal.SIGKILL, "whole": True, "left": unfinished(folder)}]


def disk_full(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Let each writer run out of disk space, and try again with space."""
    runs = []
    for kind, (path, write) in writers(folder).items():

        def work(report: Callable[[], None], write: Callable[[int], None] = write, path: Path = path) -> None:
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

        number, pipe = child(work, folder / "log")
        code = wait_for(number)
        os.close(pipe)
        error = (folder / "log.err").read_text()
        runs.append({"kind": kind, "code": code, "err": error} | json.loads((folder / "log.out").read_text() or "{}"))
    argv = ["--model", model, *MANUAL, "--prompt-cache-file", str(folder / "full")]

    def save(report: Callable[[], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        cache_prompt.main(argv)

    number, pipe = child(save, folder / "log")
    code = wait_for(number)
    os.close(pipe)
    left = [each.name for each in folder.iterdir() if "full" in each.name]
    return [*runs, {"kind": "command", "code": code, "err": (folder / "log.err").read_text(), "left": left}]


def together(folder: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Run several processes on one model, one warm-start file and one prompt cache."""
    shared = ["--model", model, "--warm-start", str(folder / "residents.json"), "--ram-budget", "1MB"]
    cases = [
        (generate, [*shared, *TEXT, "--verbose", "False"]),
        (cache_prompt, [*shared, *MANUAL, "--prompt-cache-file", str(folder / "manual")]),
    ] * count
    children = [child(command(*case), folder / f"log{number}") for number, case in enumerate(cases)]
    codes = [wait_for(number) for number, _ in children]
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
    """Run the experiment that the command line names."""
    what, folder, model, count = sys.argv[1:]
    random.seed(0)
    runs = {"interrupt": interrupt, "kill": kill, "disk_full": disk_full, "together": together}
    print(json.dumps(runs[what](Path(folder), model, int(count))))


if __name__ == "__main__":
    main()
