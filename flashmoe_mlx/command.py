"""What all commands share: mlx-lm's parsers with our flags, and errors that are one line."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def add_streaming_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags that every command of ours has."""
    group = parser.add_argument_group("expert streaming")
    group.add_argument(
        "--ram-budget",
        metavar="SIZE",
        help="Memory for experts, e.g. 12GB, or auto for what the machine can spare. The output does not depend on it "
        "(default: 0, a small pool on top of the OS page cache)",
    )
    group.add_argument(
        "--experts-per-token",
        type=int,
        metavar="K",
        help="Routed experts a token uses. Fewer are faster and change the output (default: the model's own number)",
    )
    group.add_argument(
        "--read-threads",
        type=int,
        metavar="N",
        help="Reads under way at once (default: 16)",
    )
    group.add_argument(
        "--config",
        metavar="NAME",
        help="A preset of the model's family, 'exact' or 'flash', or a .toml file. It sets the sampling flags too; "
        "flags given here win",
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1, Ctrl-C into 130, and a closed pipe into silence."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # MLX's own are RuntimeErrors
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def extend_parser(stock: argparse.ArgumentParser, description: str, epilog: str) -> argparse.ArgumentParser:
    """One of mlx-lm's parsers with our flags, our words about it, and no default model of its own."""
    parser = argparse.ArgumentParser(
        parents=[stock],
        conflict_handler="resolve",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="The path of a model folder, or a Hugging Face repo")
    add_streaming_arguments(parser)
    return parser
