"""Draws results/decode.svg from the latest warm run in results/decode.csv (needs matplotlib).

python -m benchmarks.plot
"""

import csv

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS


def main() -> None:
    with (RESULTS / "decode.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["model"] == "bench" and line["lookahead"] == "False"]
    latest = [line for line in lines if (line["commit"], line["model"]) == (lines[-1]["commit"], lines[-1]["model"])]
    latest.sort(key=lambda line: float(line["budget"]))
    budgets = [100 * float(line["budget"]) for line in latest]
    figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
    axes.axhline(100, color="0.6", linestyle="--", linewidth=1)
    axes.plot(budgets, [100 * float(line["ratio"]) for line in latest], marker="o", label="speed, mlx-lm = 100")
    axes.plot(budgets, [100 * float(line["hit_rate"]) for line in latest], marker=".", color="0.6", label="hit rate")
    axes.set(xlabel="experts in memory (%)", ylabel="%", ylim=(0, 105))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "flashmoe_mlx"  # the same drawing, the same file
    figure.savefig(RESULTS / "decode.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
