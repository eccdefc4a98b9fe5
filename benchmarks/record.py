"""Keeps benchmark figures: one CSV line each, with the machine, the versions and the commit they belong to."""

import csv
import platform
import subprocess
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from flashmoe_mlx.system.atomic_write import replacing

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any]) -> None:
    """Append a line to ``results/<name>.csv``; the file's columns are those of its first line."""
    line = {"date": date.today().isoformat(), "commit": _commit(), "machine": _machine(), **figures}
    line |= {"mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "python": platform.python_version()}
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        file.write(before)
        writer = csv.DictWriter(file, line, lineterminator="\n")
        if not before:
            writer.writeheader()
        writer.writerow(line)


@cache  # what is recorded changes the tree
def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # no repository: figures are kept all the same


def _machine() -> str:
    device = mx.device_info().get("device_name", platform.processor() or platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {device}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
