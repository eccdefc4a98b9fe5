"""Writes results/trunk.md and its figure from the latest run in results/trunk.csv (needs matplotlib).

python -m benchmarks.trunk --record
python -m benchmarks.decoder_report
"""

import csv
from typing import NamedTuple

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS

# A Mac is estimated with these figures, until its owner runs the two commands above.
# Bytes per second of an M3 Max's memory.
M3_MAX = 400e9
# Seconds: Qwen3.6-35B-A3B on an M4 takes 23 ms a token, bytes explain 14, and it launches some 3,000 times.
LAUNCH = 3e-6
# Seconds: published are 0.20 to 0.35 ms.
READ_BACK = 0.28e-3

# Ways by the names that earlier lines give them.
WAYS = {"few launches": "fused"}
PARTS = {"bytes": "0.35", "launches and host": "tab:orange", "read-back": "tab:blue"}


class Bar(NamedTuple):
    """A layer's microseconds.

    Args:
        label (str): The layer and the way.
        launches (int): Of the layer.
        parts (tuple): Its bytes at the speed of a copy, launches and host, and the read-back.
        graph (float): In which Python builds the layer's graph; 0 if unknown.
    """

    label: str
    launches: int
    parts: tuple[float, float, float]
    graph: float = 0.0


def main() -> None:
    with (RESULTS / "trunk.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["dims"] == "397b" and not line["without"]]
    for line in lines:
        line["way"] = WAYS.get(line["way"], line["way"])
    lines = [line for line in lines if (line["commit"], line["machine"]) == (lines[-1]["commit"], lines[-1]["machine"])]
    panels = {
        lines[-1]["machine"]: list(map(_measured, lines)),
        "Apple M3 Max: an estimate": list(map(_estimated, lines)),
    }
    _draw(panels)
    (RESULTS / "trunk.md").write_text(_report(lines))


def _measured(line: dict[str, str]) -> Bar:
    moved = 1e-6 * float(line["mb"]) / float(line["copy_tb_per_s"]) * 1e6
    alone, read_back = float(line["us"]), float(line["read_back_us"])
    return Bar(_label(line), int(line["launches"]), (moved, alone - moved, read_back - alone), float(line["host_us"]))


def _estimated(line: dict[str, str]) -> Bar:
    moved, launches = 1e6 * float(line["mb"]) / M3_MAX, int(line["launches"])
    return Bar(_label(line), launches, (1e6 * moved, 1e6 * LAUNCH * launches, 1e6 * READ_BACK))


def _label(line: dict[str, str]) -> str:
    context = f", {int(line['context']):,} positions" if line["kind"] == "attention" else ""
    return f"{line['kind']}{context}: {line['way']}"


def _draw(panels: dict[str, list[Bar]]) -> None:
    figure, both = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True, layout="constrained")
    for axes, (title, bars) in zip(both, panels.items(), strict=True):
        # In pairs.
        places = [-row - row // 2 * 0.5 for row in range(len(bars))]
        left = [0.0] * len(bars)
        for part, (name, color) in enumerate(PARTS.items()):
            widths = [max(0.0, bar.parts[part]) for bar in bars]
            axes.barh(places, widths, left=left, color=color, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, end, bar in zip(places, left, bars, strict=True):
            axes.annotate(f" {bar.launches} launches", (end, place), va="center", fontsize="small")
        known = [(bar.graph, place) for bar, place in zip(bars, places, strict=True) if bar.graph]
        if known:
            axes.scatter(*zip(*known, strict=True), marker="|", s=120, color="black", label="graph built by Python")
        axes.set(title=title, xlabel="us a layer", yticks=places, yticklabels=[bar.label for bar in bars])
        axes.set_xlim(0, 1.25 * max(left))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*both[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    # The same drawing is the same file.
    plt.rcParams["svg.hashsalt"] = "flashmoe_mlx"
    figure.savefig(RESULTS / "trunk.svg", metadata={"Date": None})


def _report(lines: list[dict[str, str]]) -> str:
    rows = "\n".join(map(_row, lines))
    estimates = "\n".join(map(_estimate_row, lines))
    return f"""# Where a token's time goes

Layers of the 397B model's size, 4 bits, experts in memory, one token after another, on {lines[-1]["machine"]}.
The same layers are computed by mlx-lm's code and fused, in turns. With read-back the host learns the chosen experts of
every layer before it continues, as streaming has to: mlx-lm's layers are called once they are known, ours are the
layers that stream, with all experts in slots.

- **Bytes**: weights, experts and state of a layer at the speed of a copy, {lines[-1]["copy_tb_per_s"]} TB/s.
- **Launches and host**: the rest of a layer's time. Python alone needs the time in the column *graph*.
- **Read-back**: the time added by waiting for the router.

![Parts of a layer's time](trunk.svg)

| layer | positions | way | launches | graph, us | MB | us | / mlx-lm's | with read-back, us | / mlx-lm's |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

A launch is an operation of MLX's graph that is not a view, experts not counted.

## On an M3 Max: an estimate

Nothing here ran on a Mac. The estimate takes {M3_MAX / 1e9:.0f} GB/s for the bytes above,
{1e6 * LAUNCH:.0f} us for a launch and {1e3 * READ_BACK:.2f} ms for a read-back.
The cost of a launch is derived: Qwen3.6-35B-A3B on an M4 takes 23 ms a token without read-backs (mlx-lm's issue 1438),
of which 1.7 GB at 120 GB/s explain 14, and it launches some 3,000 times. Read-backs are published as 0.20 to 0.35 ms.

| layer | positions | way | bytes, us | launches, us | us | with read-back, us |
| --- | --- | --- | --- | --- | --- | --- |
{estimates}

These commands replace the estimate, on a Mac with 16 GB:

```
python -m benchmarks.trunk --record
python -m benchmarks.decoder_report
```

Commit, versions and the gain of each kernel are in `trunk.csv`; `without` names the kernels left out.
"""


def _row(line: dict[str, str]) -> str:
    names = ("kind", "context", "way", "launches", "host_us", "mb", "us", "ratio", "read_back_us", "read_back_ratio")
    return "| " + " | ".join(line[name] for name in names) + " |"


def _estimate_row(line: dict[str, str]) -> str:
    moved, launches, read_back = _estimated(line).parts
    figures = (moved, launches, moved + launches, moved + launches + read_back)
    return "| " + " | ".join([line["kind"], line["context"], line["way"], *(f"{each:.0f}" for each in figures)]) + " |"


if __name__ == "__main__":
    main()
