"""The command ``flashmoe``, which runs all others.

flashmoe generate --prompt "What is a heron?"
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from flashmoe_mlx.cli.commands import COMMANDS
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.interrupts import exit_on_interrupt
from flashmoe_mlx.cli.terminal import open_standard_streams

EPILOG = """examples:
  flashmoe generate --prompt "What is a heron?"
  flashmoe chat --model mlx-community/Qwen3.5-397B-A17B-4bit --ram-budget 20GB

The flags of a command: flashmoe COMMAND --help
"""

_SHELLS = ("bash", "zsh", "fish")


def setup_arg_parser(commands: Mapping[str, argparse.ArgumentParser] | None = None) -> argparse.ArgumentParser:
    """Return the parser of ``flashmoe`` itself.

    Args:
        commands (Mapping[str, ArgumentParser], optional): The commands' own parsers by name. They take a second to
            import. Default: ``None``, for commands without flags.
    """
    parser = argparse.ArgumentParser(
        prog=_prog(),
        usage="%(prog)s COMMAND ...",
        description="Run Mixture-of-Experts models whose experts stay on disk, with MLX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Added below, after the commands.
        add_help=False,
    )
    rows = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        parents = [commands[command.name]] if commands else []
        rows.add_parser(command.name, help=command.summary, parents=parents, conflict_handler="resolve")
    group = parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="help", help="Print this text")
    group.add_argument("--version", action="store_true", help="Print versions and the backend in use")
    group.add_argument("--print-completion", choices=_SHELLS, help="Print a script for tab completion in a shell")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, or print what ``flashmoe`` itself is asked for.

    Args:
        argv (Sequence[str], optional): Command line without the program's name. Default: ``sys.argv[1:]``.
    """
    open_standard_streams()
    exit_on_interrupt()
    argv = sys.argv[1:] if argv is None else argv
    command = next((command for command in COMMANDS if argv and command.name == argv[0]), None)
    if command is not None:
        command.run(f"{_prog()} {command.name}", argv[1:])
    _answer(argv)


@one_line_errors()
def _answer(argv: Sequence[str]) -> None:
    parser = setup_arg_parser()
    if argv and not argv[0].startswith("-"):
        close = get_close_matches(argv[0], [command.name for command in COMMANDS], n=1)
        advice = f"did you mean {close[0]}?" if close else f"{parser.prog} --help lists them"
        parser.exit(2, f"{parser.prog}: error: unknown command {argv[0]!r}: {advice}\n")
    args = parser.parse_args(argv)
    if args.version:
        from flashmoe_mlx.cli.version import versions

        print(versions())
    elif args.print_completion is not None:
        from flashmoe_mlx.cli.completion import command_parsers, completion

        parser = setup_arg_parser(command_parsers())
        parser.prog = "flashmoe"
        print(completion(parser, args.print_completion))
    else:
        parser.print_help()


def _prog() -> str:
    """Return how this command was started: ``flashmoe``, or with ``python -m``."""
    name = Path(sys.argv[0]).name
    return "python -m flashmoe_mlx" if name == "__main__.py" else name


if __name__ == "__main__":
    main()
