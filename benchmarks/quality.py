"""Quality of a trained model with fewer experts per token and with fewer bits.

    python -m benchmarks.quality --model FOLDER --text FILE --tasks FILE
    python -m benchmarks.quality --model FOLDER --text FILE --tasks FILE --record

All combinations of the model's own number of experts, 6, 4 and 2 with experts of 8, 4, 3 and 2 bits, rounded to the
nearest. ``--record`` writes results/quality.csv, quality.md and quality.svg (needs matplotlib); otherwise the page is
printed. Nothing is predicted: the first line is the reference's own setting, with which all others are compared. The
last line is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

from benchmarks.record import RESULTS, record
from flashmoe_mlx import evaluate
from flashmoe_mlx.evaluation.measure import Row
from flashmoe_mlx.evaluation.metrics import Estimate, Quality
from flashmoe_mlx.evaluation.report import draw
from flashmoe_mlx.evaluation.tasks import TaskScores, read_tasks
from flashmoe_mlx.model.load import load

BITS = (8, 4, 3, 2)
EXPERTS = (6, 4, 2)
# Experts per token that Flash-MoE uses, instead of 10 of its model.
FLASH_MOE = 4

HEADINGS = (
    *("bits", "experts", "perplexity", "/ reference's", "KLD, nats", "KLD 99%", "top-1", "recall", "calls parse"),
    "calls right",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--text", required=True, help="text to predict; a small model should know its subject")
    parser.add_argument("--tasks", required=True, help="tasks to answer, as for flashmoe_mlx.evaluate")
    parser.add_argument("--max-positions", default="2048", help="tokens of the text (default: %(default)s)")
    parser.add_argument("--cache-dir", default="build/quality", help="of requantized copies (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="write the files in results/")
    args = parser.parse_args()

    native = load(str(args.model), lazy=True)[0].streaming.native_experts_per_token
    argv = ["--model", str(args.model), "--text", args.text, "--tasks", args.tasks, "--cache-dir", args.cache_dir]
    argv += ["--max-positions", args.max_positions, "--bits", *map(str, BITS)]
    argv += ["--experts-per-token", str(native), *(str(count) for count in EXPERTS if count < native)]
    rows = evaluate.evaluate(evaluate.setup_arg_parser().parse_args(argv))
    page = report(rows, native, _parameters(args.model), args)
    if args.record:
        for row in rows:
            record("quality", row.columns())
        draw(rows, RESULTS / "quality.svg")
        (RESULTS / "quality.md").write_text(page)
    else:
        print(page)
    print(json.dumps({"rows": [row.columns() for row in rows]}))


def report(rows: Sequence[Row], native: int, parameters: int, args: argparse.Namespace) -> str:
    """Return the page about the rows, of which the first is the reference's own setting."""
    positions, tasks = _measured(rows[0])[0].positions, len(read_tasks(Path(args.tasks)))
    lines = "\n".join(map(_line, rows))
    return f"""# What fewer experts and fewer bits cost

`{args.model}`, {parameters / 1e6:.0f} million parameters. **This network is small**: the figures are its
own, and a larger one has to be measured itself.

The reference is the model as it is, with its own {native} experts a token. {positions} tokens of
`{Path(args.text).name}`, one a step; {tasks} tasks of `{Path(args.tasks).name}`. Bits are those of the
experts, rounded to the nearest; the trunk keeps its own. In brackets 95% intervals: from blocks of 16
tokens for means, Wilson's for shares.

- **Flash-MoE's {FLASH_MOE} experts** instead of {native}: {_damage(_find(rows, BITS[0], FLASH_MOE))}
- **2 bits by rounding to the nearest**, all {native} experts: {_damage(_find(rows, 2, native))}
- **Both**: {_damage(_find(rows, 2, FLASH_MOE))}

| {" | ".join(HEADINGS)} |
|{" --- |" * len(HEADINGS)}
{lines}

![Divergence and agreement over experts per token](quality.svg)

Made on {date.today().isoformat()} by `python -m benchmarks.quality`; machine, versions and commit are in `quality.csv`.
"""


def _find(rows: Sequence[Row], bits: int, experts: int) -> Row:
    return next(r for r in rows if (r.setting.bits, r.setting.experts_per_token) == (bits, experts))


def _measured(row: Row) -> tuple[Quality, TaskScores]:
    """Return what was measured on the text and on the tasks."""
    assert row.quality is not None and row.scores is not None
    return row.quality, row.scores


def _damage(row: Row) -> str:
    quality, scores = _measured(row)
    parts = [
        f"perplexity times {_cell(quality.perplexity_ratio)}",
        f"divergence {_cell(quality.kld)} nats a token",
        f"the same likeliest token at {_percent(quality.agreement)} of the positions",
    ]
    if scores.recall is not None:
        parts.append(f"{_percent(scores.recall)} of the answers recalled")
    if scores.calls_parse is not None:
        parts.append(f"{_percent(scores.calls_parse)} of the tool calls parse")
    return ", ".join(parts) + "."


def _line(row: Row) -> str:
    quality, scores = _measured(row)
    cells = [str(row.setting.bits), str(row.setting.experts_per_token)]
    cells += [_cell(quality.perplexity), _cell(quality.perplexity_ratio), _cell(quality.kld), f"{quality.kld_p99:.3g}"]
    cells += [_percent(share) for share in (quality.agreement, scores.recall, scores.calls_parse, scores.calls_right)]
    return f"| {' | '.join(cells)} |"


def _cell(figure: Estimate) -> str:
    value, low, high = (f"{number:.4g}" for number in figure)
    return f"{value} ({low} to {high})"


def _percent(figure: Estimate | None) -> str:
    if figure is None:
        return ""
    value, low, high = (f"{100 * number:.1f}" for number in figure)
    return f"{value}% ({low} to {high})"


def _parameters(folder: Path) -> int:
    """Return the number of a model's weights, which does not depend on their quantization."""
    model, _ = load_model(folder, lazy=True)
    count = 0
    for _, module in model.named_modules():
        own = {name: array for name, array in module.items() if isinstance(array, mx.array)}
        if "scales" in own:
            count += own["scales"].size * module.group_size
        else:
            count += sum(array.size for array in own.values())
    return count


if __name__ == "__main__":
    main()
