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
    """Append a line to ``results/<name>.csv``. A new figure becomes a new column, which is empty in earlier lines."""
    line = {"date": date.today().isoformat(), "commit": _commit(), "machine": _machine(), **figures}
    line |= {"mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "python": platform.python_version()}
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    columns: list[str] = []
    lines: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, lines = list(reader.fieldnames or ()), list(reader)
    columns += [column for column in line if column not in columns]
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*lines, line])


# Kept for a whole run, because recording its first line makes the tree dirty.
@cache
def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # Without a repository figures are recorded all the same.
        return "unknown"


def _machine() -> str:
    device = mx.device_info().get("device_name", platform.processor() or platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {device}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
