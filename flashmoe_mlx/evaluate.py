"""Measure what fewer experts, fewer bits or another checkpoint cost: perplexity, divergence and tasks.

python -m flashmoe_mlx.evaluate --model FOLDER_OR_REPO --text FILE --experts-per-token 10 6 4
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.cli.arguments import command_parser
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.config import Config
from flashmoe_mlx.evaluation.measure import Row, Setting, Text, measure, open_reference
from flashmoe_mlx.evaluation.report import _print_table, _write_csv, draw
from flashmoe_mlx.evaluation.tasks import Task, read_tasks
from flashmoe_mlx.model.load import load
from flashmoe_mlx.model.requantize import expert_bits, requantize

EPILOG = """Every combination of --bits, --experts-per-token and --ram-budget is a line of the table. Each is compared
with the reference: the model as it is, with its own number of experts. Intervals are of 95%, as if the text had been
drawn at random in blocks of 16 tokens; for shares, as if each were independent.

examples:
  python -m flashmoe_mlx.evaluate --model ./model --text book.txt --experts-per-token 10 6 4 2
  python -m flashmoe_mlx.evaluate --model ./model --text - --bits 4 3 2 --csv quality.csv --plot quality.svg < book.txt
  python -m flashmoe_mlx.evaluate --model ./4bit --reference ./bf16 --text book.txt --reference-cache bf16.safetensors
  python -m flashmoe_mlx.evaluate --model ./model --tasks tasks.jsonl

A task is a line of JSON: {"messages": [...], "expect": "the answer"}, or with tools
{"messages": [...], "tools": [...], "expect": {"name": "weather", "arguments": {"city": "Oslo"}}}
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's own parser."""
    parser = command_parser(
        "Measure what fewer experts, fewer bits or another checkpoint cost in quality.",
        EPILOG,
    )
    parser.add_argument("--model", required=True, help="The path of a model folder, or a Hugging Face repo")
    parser.add_argument("--reference", metavar="MODEL", help="What to compare with (default: the model itself)")
    group = parser.add_argument_group("what to try")
    group.add_argument(
        "--experts-per-token",
        type=int,
        nargs="+",
        metavar="K",
        help="Routed experts a token uses (default: the model's own number)",
    )
    group.add_argument(
        "--bits",
        type=int,
        nargs="+",
        metavar="B",
        help="Bits of the experts, rounded to the nearest in copies that are kept in --cache-dir (default: its own)",
    )
    group.add_argument(
        "--ram-budget", nargs="+", default=["0"], metavar="SIZE", help="Memory for experts, as in generate (default: 0)"
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument("--text", metavar="FILE", help="What the models read, a token a step; - is stdin")
    group.add_argument("--max-positions", type=int, metavar="N", help="Predict no more tokens of it (default: all)")
    group.add_argument(
        "--context", type=int, default=512, metavar="N", help="Start anew after so many tokens (default: 512)"
    )
    group.add_argument("--tasks", metavar="FILE", help="Questions and their answers, a line of JSON each")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="The longest answer to a task (default: 256)"
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--reference-cache",
        metavar="FILE",
        help="Keep what the reference says, 4 bytes for each token of the vocabulary at each position "
        "(default: a temporary file)",
    )
    group.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        default=str(Path(HF_HOME) / "flashmoe_mlx"),
        help="Where the copies of --bits are kept (default: %(default)s)",
    )
    group.add_argument("--csv", metavar="FILE", help="Write the table as CSV too")
    group.add_argument("--plot", metavar="FILE", help="Draw it, e.g. quality.svg (needs matplotlib and a text)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        args = setup_arg_parser().parse_args(argv)
        rows = evaluate(args)
        _print_table(rows)
        if args.plot is not None:
            draw(rows, Path(args.plot).expanduser())


def evaluate(args: argparse.Namespace) -> list[Row]:
    """The rows that a command line asks for, written to ``--csv`` one by one as they are measured.

    Args:
        args: from :func:`setup_arg_parser`.

    Raises:
        ValueError: a setting is impossible, or the text or a task is not what it should be.
        OSError: a file cannot be read or written.
    """
    _refuse_nonsense(args)
    folder = find_folder(args.model)
    reference_folder = folder if args.reference is None else find_folder(args.reference)
    tasks = [] if args.tasks is None else read_tasks(Path(args.tasks).expanduser())
    model, tokenizer = load(str(folder), lazy=True)[:2]  # reads no weights
    native = model.streaming.native_experts_per_token
    del model
    _refuse_tasks(tasks, tokenizer, folder)
    for top_k in args.experts_per_token or []:
        if top_k > native > 0:
            raise ValueError(f"experts_per_token is {top_k}, and {folder} was trained with {native}")
    text = None if args.text is None else _read_text(args, tokenizer, load_tokenizer(reference_folder))
    own_bits = expert_bits(folder)
    copies = {
        bits: folder if bits == own_bits else requantize(folder, bits, Path(args.cache_dir).expanduser())
        for bits in args.bits or [own_bits]
    }
    grid = product(copies.items(), args.experts_per_token or [native], args.ram_budget)
    name = Path(args.model).name or folder.resolve().name  # a repo's folder is called by its commit
    settings = [Setting(name, copy, bits, top_k, budget) for (bits, copy), top_k, budget in grid]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(args.reference_cache or Path(temporary) / "reference.safetensors").expanduser()
        reference = None if text is None else open_reference(reference_folder, text, path)
        rows: list[Row] = []
        for setting in settings:
            rows.append(measure(setting, text, reference, tasks, args.max_tokens))
            if args.csv is not None:
                _write_csv(rows, Path(args.csv))
    return rows


def _refuse_nonsense(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    if args.text is None and args.tasks is None:
        raise ValueError("nothing to measure: give --text, --tasks or both")
    if args.plot is not None and args.text is None:
        raise ValueError("--plot draws what is measured on a text: give --text")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for name in ("max_positions", "context", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be a whole number from 1 on")
    for top_k, budget in product(args.experts_per_token or [None], args.ram_budget):
        Config(experts_per_token=top_k, ram_budget=budget)
    for file in (args.csv, args.plot, args.reference_cache):
        path = Path(file or "any").expanduser()
        if path.is_dir() or not path.parent.is_dir():  # better now than after a long text
            raise OSError(f"cannot write {path}: its folder is missing, or it is a folder itself")


def _refuse_tasks(tasks: Sequence[Task], tokenizer: TokenizerWrapper, folder: Path) -> None:
    if tasks and tokenizer.chat_template is None:
        raise ValueError(f"{folder} has no chat template: tasks are put to chat models")
    if any(task.tools for task in tasks) and not tokenizer.has_tool_calling:
        raise ValueError(f"mlx-lm knows no tool parser for {folder}: leave the tasks with tools out")


def _read_text(args: argparse.Namespace, tokenizer: TokenizerWrapper, reference: TokenizerWrapper) -> Text:
    try:
        text = sys.stdin.read() if args.text == "-" else Path(args.text).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text} is not UTF-8 text: {error}") from error
    tokens = tokenizer.encode(text, verbose=False)  # a long text is no mistake: it is read in windows
    if reference.encode(text, verbose=False) != tokens:
        raise ValueError("the reference splits the text into other tokens than the model: they cannot be compared")
    if args.max_positions is not None:
        tokens = tokens[: args.max_positions + 1]
    if len(tokens) < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens: there must be two at least, one to show and one to predict"
        )
    return Text(tokens, args.context)
