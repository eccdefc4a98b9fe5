"""Draw demo/training/loss.svg from demo/training/loss.csv (needs matplotlib).

python -m demo.training.plot
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    """Draw the loss curve."""
    with (HERE / "loss.csv").open() as file:
        lines = list(csv.DictReader(file))
    tokens = [float(line["tokens"]) / 1e6 for line in lines]
    figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
    axes.plot(tokens, [float(line["words"]) for line in lines], label="words")
    axes.plot(tokens, [float(line["tools"]) for line in lines], label="tools")
    axes.set(xlabel="tokens read (millions)", ylabel="loss (nats a token)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "flashmoe_mlx"  # the same drawing, the same file
    figure.savefig(HERE / "loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
