"""Tables and plots of an evaluation."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flashmoe_mlx.evaluation.measure import Row
from flashmoe_mlx.system.atomic_write import replacing

_COLUMNS = {
    "perplexity": ("perplexity", 1),
    "perplexity_ratio": ("/ reference's", 1),
    "kld": ("KLD, nats", 1),
    "kld_p99": ("KLD 99%", 1),
    "agreement": ("top-1, %", 100),
    "recall": ("recall, %", 100),
    "calls_parse": ("calls parse, %", 100),
    "calls_right": ("calls right, %", 100),
}
"""Heading and factor of each figure that the printed table has."""

_WIDTH = 200
"""Characters of a printed table that is not shown in a terminal, where rich would assume 80."""


def print_table(rows: Sequence[Row]) -> None:
    """Print what was measured, with confidence intervals."""
    lines = [row.columns() for row in rows]
    measured = {name: shown for name, shown in _COLUMNS.items() if any(line[name] is not None for line in lines)}
    table = Table(title=f"{rows[0].setting.model}: figures with their 95% intervals")
    for heading in ("bits", "experts", "budget", *(heading for heading, _ in measured.values())):
        table.add_column(heading, justify="right")
    for line in lines:
        figures = (_format(line, name, scale) for name, (_, scale) in measured.items())
        table.add_row(str(line["bits"] or "own"), str(line["experts_per_token"]), str(line["ram_budget"]), *figures)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line of CSV per row. If interrupted, the old file is left as it was.

    Raises:
        OSError: The file cannot be written.
    """
    lines = [row.columns() for row in rows]
    with replacing(path.expanduser()) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw divergence and agreement over the experts per token, with one line for each number of bits.

    Args:
        rows (Sequence[Row]): Of one model, each with a quality.
        path (Path): The file, whose suffix chooses the format.
    """
    # An optional dependency that takes a second to import.
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    # The other budgets have the same output.
    budget = rows[0].setting.ram_budget
    for bits in dict.fromkeys(row.setting.bits for row in rows):
        line = [row for row in rows if (row.setting.bits, row.setting.ram_budget) == (bits, budget)]
        line.sort(key=lambda row: row.setting.experts_per_token)
        top_k = [row.setting.experts_per_token for row in line]
        for axes, name, scale in zip(panels, ("kld", "agreement"), (1, 100), strict=True):
            value, low, high = scale * np.array([getattr(row.quality, name) for row in line]).T
            axes.errorbar(
                top_k, value, (value - low, high - value), marker="o", capsize=2, label=f"{bits or 'own'} bits"
            )
    ticks = sorted({row.setting.experts_per_token for row in rows})
    panels[0].set(ylabel="divergence from the reference (nats)", ylim=(0, None))
    panels[1].set(ylabel="same likeliest token (%)", ylim=(None, 100.5))
    panels[1].legend(frameon=False)
    for axes in panels:
        axes.set(xlabel="experts per token", xticks=ticks)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _format(line: dict[str, Any], name: str, scale: float) -> str:
    figures = [scale * line[part] for part in (name, f"{name}_low", f"{name}_high") if part in line]
    value, *ends = (f"{figure:.4g}" for figure in figures)
    return f"{value}\n{' to '.join(ends)}" if ends else value
