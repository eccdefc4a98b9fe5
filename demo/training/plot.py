"""Draw demo/training/loss.svg from demo/training/loss.csv.

python -m demo.training.plot
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent


def main() -> None:
    """Draw the loss curves of words and tools."""
    with (FOLDER / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
    axes.plot(tokens, [float(row["words"]) for row in rows], label="words")
    axes.plot(tokens, [float(row["tools"]) for row in rows], label="tools")
    axes.set(xlabel="tokens read (millions)", ylabel="loss (nats a token)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    # Element ids are random without a salt; with it, the same data makes the same file.
    plt.rcParams["svg.hashsalt"] = "flashmoe_mlx"
    figure.savefig(FOLDER / "loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
