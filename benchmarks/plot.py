"""Draw results/decode.svg, memory.svg and layers.svg from the CSV files in the same folder (needs matplotlib).

python -m benchmarks.plot
"""

import csv
from collections.abc import Sequence
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.record import RESULTS

# Colors that can be read on white and on black.
_OURS, _OTHERS, _TEXT = "#14919b", "#9aa5b1", "#7b8794"
_STYLE = {
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _TEXT,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    # The same drawing is the same file.
    "svg.hashsalt": "flashmoe_mlx",
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}

Row = dict[str, str]


def main() -> None:
    """Draw all of them."""
    plt.rcParams.update(_STYLE)
    _draw_decode(_latest([row for row in _read("decode") if row["model"] == "bench" and row["lookahead"] == "False"]))
    _draw_memory(_read("llama"))
    _draw_layers([row for row in _read("decode") if row["model"] == "q397" and row["lookahead"] == "False"])


def _draw_decode(rows: Sequence[Row]) -> None:
    """Speed and hit rate over the share of experts in memory."""
    _, axes = plt.subplots(figsize=(6.4, 3))
    shares = [100 * float(row["budget"]) for row in rows]
    axes.axhline(100, color=_OTHERS, linestyle="--", linewidth=1)
    speeds = [100 * float(row["ratio"]) for row in rows]
    axes.plot(shares, speeds, marker="o", color=_OURS, label="speed, mlx-lm with all in memory = 100")
    axes.plot(shares, [100 * float(row["hit_rate"]) for row in rows], marker=".", color=_OTHERS, label="hit rate")
    axes.set(xlabel="experts in memory (%)", ylabel="%", ylim=(0, 105))
    axes.legend(loc="lower right")
    _save("decode")


def _draw_memory(rows: Sequence[Row]) -> None:
    """Speed of streaming and of llama.cpp while memory gets short, on the model that the last line is about."""
    rows = [row for row in rows if row["gguf_mb"] == rows[-1]["gguf_mb"]]
    left = sorted({row["leave_gb"] for row in rows}, key=lambda gigabytes: -float(gigabytes or "inf"))
    _, axes = plt.subplots(figsize=(7.2, 3.4))
    axes.margins(y=0.12)
    for offset, column, label, color in (
        (-0.2, "tps", "flashmoe_mlx", _OURS),
        (0.2, "llama_tps", "llama.cpp", _OTHERS),
    ):
        runs = [[float(row[column]) for row in rows if row["leave_gb"] == gigabytes] for gigabytes in left]
        bars = axes.bar([place + offset for place in range(len(left))], list(map(mean, runs)), 0.38, color=color)
        bars.set_label(label)
        axes.bar_label(bars, [" and ".join(f"{speed:.1f}" for speed in sorted(each)) for each in runs], padding=2)
    model = float(rows[-1]["gguf_mb"]) / 1000
    names = [f"{gigabytes} GB left" if gigabytes else "all in memory" for gigabytes in left]
    axes.set(xticks=range(len(left)), xticklabels=names, ylabel="tokens per second")
    axes.set_title(f"A model of {model:.1f} GB. {rows[-1]['machine']}", fontsize="medium")
    axes.legend(loc="upper right")
    _save("memory")


def _draw_layers(rows: Sequence[Row]) -> None:
    """Milliseconds a layer on a GPU over the share of experts in memory, for each number of experts per token."""
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
    counts = sorted({row["experts_per_token"] for row in rows}, key=int, reverse=True)
    for axes, top_k in zip(panels, counts, strict=True):
        _draw_layer(axes, [row for row in rows if row["experts_per_token"] == top_k])
        axes.set_title(f"{top_k} experts per token", fontsize="medium")
    panels[0].set_ylabel("milliseconds per layer")
    panels[1].legend(loc="upper right")
    figure.supxlabel("experts in memory", color=_TEXT, fontsize="medium")
    _save("layers")


def _draw_layer(axes: Axes, rows: Sequence[Row]) -> None:
    names = [f"{100 * float(row['budget']):.0f}%" for row in rows]
    times = [float(row["ms_per_layer"]) for row in rows]
    # Megabytes per gigabyte per second are milliseconds.
    reads = [float(row["mb_per_token"]) / float(row["cache_gbps"]) / int(row["layers"]) for row in rows]
    rest = [time - read for time, read in zip(times, reads, strict=True)]
    axes.bar(names, reads, 0.6, color=_OURS, label="bytes, at the page cache's rate")
    bars = axes.bar(names, rest, 0.6, bottom=reads, color=_OTHERS, label="copy to the GPU, sync, compute")
    axes.bar_label(bars, [f"{time:.2g}" for time in times], padding=7)
    resident = float(rows[-1]["resident_ms_per_layer"])
    axes.axhline(resident, color=_TEXT, linestyle="--", linewidth=1, label="mlx-lm, all in memory")


def _read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Those of the last run, by budget."""
    run = [row for row in rows if (row["commit"], row["machine"]) == (rows[-1]["commit"], rows[-1]["machine"])]
    return sorted(run, key=lambda row: float(row["budget"]))


def _save(name: str) -> None:
    plt.gcf().savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close()


if __name__ == "__main__":
    main()
