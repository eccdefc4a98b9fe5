"""Chat with a model whose experts are streamed, and let it call your Python functions.

flashmoe chat --model FOLDER_OR_REPO --tools my_tools.py
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import sys
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm import chat as mlx_chat

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.chat_loop import ChatLoop
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.config import check_integer
from flashmoe_mlx.generation.python_tools import PythonTools

EPILOG = """examples:
  flashmoe chat --model mlx-community/Qwen3.5-397B-A17B-4bit --config exact --ram-budget 20GB
  flashmoe chat --tools my_tools.py
  flashmoe chat < questions.txt > answers.txt

Ctrl-C stops an answer; at a prompt, it ends the program. A line with q, r or h alone quits, begins a new conversation,
or shows help. If stdin is not a terminal, each line is a turn. Answers go to stdout, everything else to stderr.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return mlx_lm.chat's parser with the flags of expert streaming, thinking and tools."""
    description = "Chat with a Mixture-of-Experts model whose experts stay on disk."
    parser = extend_parser(mlx_chat.setup_arg_parser(), description, EPILOG)
    parser.add_argument("--top-k", type=int, default=0, help="Sampling top-k (default: 0, off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="Sampling min-p (default: 0, off)")
    parser.add_argument(
        "--thinking",
        choices=["show", "hide", "off"],
        default="show",
        help="Show the model's thoughts dimmed, hide them, or tell it not to think (default: show)",
    )
    group = parser.add_argument_group("tools")
    group.add_argument(
        "--tools",
        metavar="FILE",
        help="A Python file. It is run, and the model may call its public functions, which need type hints and "
        "Google-style docstrings. Each call is shown, and you are asked before it runs",
    )
    group.add_argument(
        "--yes",
        action="store_true",
        help="Run each call without asking: the model alone decides what your functions do. Required with --tools if "
        "stdin is not a terminal",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _chat(setup_arg_parser(), argv)


def _chat(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    args, config = parse_arguments(parser, argv)
    if args.pipeline:
        raise ValueError("--pipeline is for a model on several machines, and chat runs on one: leave it out")
    check_integer("max_tokens", args.max_tokens)
    if args.tools is not None and not args.yes and not sys.stdin.isatty():
        raise ValueError("stdin is not a terminal, so nobody can be asked before a tool runs: pass --yes")
    tools = PythonTools({}) if args.tools is None else PythonTools.load(args.tools)
    mx.random.seed(args.seed)
    ChatLoop(args, config, tools).run()
