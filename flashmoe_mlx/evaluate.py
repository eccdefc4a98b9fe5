"""Measure what fewer experts, fewer bits or another checkpoint cost: perplexity, divergence and tasks.

flashmoe evaluate --model FOLDER_OR_REPO --text FILE --experts-per-token 10 6 4
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import importlib.util
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.cli.arguments import check_texts, command_parser, flag
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.config import Config, check_integer
from flashmoe_mlx.evaluation.measure import Row
from flashmoe_mlx.evaluation.report import draw, print_table, write_csv
from flashmoe_mlx.evaluation.sweep import combine, sweep
from flashmoe_mlx.evaluation.tasks import check_answerable, read_tasks
from flashmoe_mlx.evaluation.text import Text
from flashmoe_mlx.model.load import load
from flashmoe_mlx.model.tokenizer import load_tokenizer
from flashmoe_mlx.system.text import read_stdin, read_text

EPILOG = """Every combination of --bits, --experts-per-token and --ram-budget is a row of the table. Each is compared
with the reference: the model with its own number of experts. Intervals are of 95%, as if the text had been drawn at
random in blocks of 16 tokens; for shares, as if the trials were independent.

examples:
  flashmoe evaluate --model ./model --text book.txt --experts-per-token 10 6 4 2
  flashmoe evaluate --model ./model --text - --bits 4 3 2 --csv quality.csv --plot quality.svg < book.txt
  flashmoe evaluate --model ./4bit --reference ./bf16 --text book.txt --reference-cache bf16.safetensors
  flashmoe evaluate --model ./model --tasks tasks.jsonl

A task is a line of JSON: {"messages": [...], "expect": "the answer"}, or with tools
{"messages": [...], "tools": [...], "expect": {"name": "weather", "arguments": {"city": "Oslo"}}}
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("Measure what fewer experts, fewer bits or another checkpoint cost in quality.", EPILOG)
    parser.add_argument("--model", required=True, help="The path of a model folder, or a Hugging Face repo")
    parser.add_argument("--reference", metavar="MODEL", help="Model to compare with (default: the model itself)")
    group = parser.add_argument_group("settings to compare")
    group.add_argument(
        "--experts-per-token",
        type=int,
        nargs="+",
        metavar="K",
        help="Routed experts per token (default: the model's own number)",
    )
    group.add_argument(
        "--bits",
        type=int,
        nargs="+",
        metavar="B",
        help="Bits of the experts, rounded to nearest in copies kept in --cache-dir (default: the model's own)",
    )
    group.add_argument(
        "--ram-budget",
        nargs="+",
        default=["0"],
        metavar="SIZE",
        help="Memory for cached experts, as in flashmoe generate (default: 0)",
    )
    group = parser.add_argument_group("measurements")
    group.add_argument("--text", metavar="FILE", help="Text to predict, one token per step; - reads from stdin")
    group.add_argument("--max-positions", type=int, metavar="N", help="Tokens of it to predict (default: all)")
    group.add_argument(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="Start with an empty cache again after this many tokens (default: %(default)s)",
    )
    group.add_argument("--tasks", metavar="FILE", help="Questions and answers, one line of JSON each")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="Longest answer to a task (default: %(default)s)"
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--reference-cache",
        metavar="FILE",
        help="Keep the reference's log probabilities, 4 bytes for each token of the vocabulary at each position "
        "(default: a temporary file)",
    )
    group.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        default=str(Path(HF_HOME) / "flashmoe_mlx"),
        help="Where copies with other --bits are kept (default: %(default)s)",
    )
    group.add_argument("--csv", metavar="FILE", help="Also write the table as CSV")
    group.add_argument("--plot", metavar="FILE", help="Draw it, e.g. quality.svg (needs matplotlib and --text)")
    return parser


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): Command line without the program's name. Default: ``sys.argv[1:]``.
    """
    args = setup_arg_parser().parse_args(argv)
    check_texts(args)
    rows = evaluate(args)
    print_table(rows)
    if args.plot is not None:
        draw(rows, Path(args.plot).expanduser())


def evaluate(args: argparse.Namespace) -> list[Row]:
    """Measure what a command line asks for, and write ``--csv`` again after each row.

    Args:
        args (Namespace): From :func:`setup_arg_parser`.

    Raises:
        ValueError: A setting is impossible, or the text or a task is invalid.
        OSError: A file cannot be read or written.
    """
    _check(args)
    folder = find_folder(args.model)
    reference = folder if args.reference is None else find_folder(args.reference)
    tasks = [] if args.tasks is None else read_tasks(Path(args.tasks).expanduser())
    # Lazy: no weights are read.
    model, tokenizer = load(str(folder), lazy=True)[:2]
    native = model.streaming.native_experts_per_token
    del model
    check_answerable(tasks, tokenizer, folder)
    for top_k in args.experts_per_token or []:
        if top_k > native > 0:
            raise ValueError(f"experts_per_token is {top_k}: {folder} was trained with {native}")
    text = None
    if args.text is not None:
        text = Text.encode(_text(args.text), tokenizer, load_tokenizer(reference), args.context, args.max_positions)
    # The folder of a repository is named after a commit.
    name = Path(args.model).name or folder.resolve().name
    copies = Path(args.cache_dir).expanduser()
    settings = combine(name, folder, args.bits, args.experts_per_token or [native], args.ram_budget, copies)
    cache = None if args.reference_cache is None else Path(args.reference_cache).expanduser()
    rows: list[Row] = []
    for row in sweep(settings, reference, text, cache, tasks, args.max_tokens):
        rows.append(row)
        if args.csv is not None:
            write_csv(rows, Path(args.csv))
    return rows


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before a model is read."""
    if args.text is None and args.tasks is None:
        raise ValueError("nothing to measure: give --text, --tasks or both")
    if args.plot is not None and args.text is None:
        raise ValueError("--plot draws measurements on a text: give --text")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for name in ("max_positions", "context", "max_tokens"):
        if getattr(args, name) is not None:
            check_integer(flag(name), getattr(args, name))
    for top_k, budget in product(args.experts_per_token or [None], args.ram_budget):
        Config(experts_per_token=top_k, ram_budget=budget)
    for file in (args.csv, args.plot, args.reference_cache):
        path = Path(file or "any").expanduser()
        if path.is_dir() or not path.parent.is_dir():
            raise OSError(f"cannot write {path}: its folder is missing, or it is a folder itself")


def _text(file: str) -> str:
    return read_stdin() if file == "-" else read_text(Path(file).expanduser())
