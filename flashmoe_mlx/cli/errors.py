"""Errors become one line, and Ctrl-C exit code 130."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flashmoe_mlx.cli.interrupts import exit_interrupted, watch_interrupts
from flashmoe_mlx.system.text import brief

# What a full disk or a quota answers.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors into one line and exit code 1, Ctrl-C into 130, and a closed pipe into silence.

    Every command's ``main()`` is decorated with it. An error that nobody expected is one line too, which says how to
    see its traceback: Python's development mode, ``python -X dev``.
    """
    try:
        with watch_interrupts():
            if sys.stdout is None:
                raise OSError("stdout is closed: redirect it to a file, or to /dev/null")
            yield
            sys.stdout.flush()
    # Of argparse, after --help or a wrong flag.
    except SystemExit:
        if sys.stdout is not None and (failure := _flush()) is not None:
            _exit_with(failure)
        raise
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        if signal.getsignal(signal.SIGINT) is exit_interrupted:
            exit_interrupted()
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _exit_with(error)


def _exit_with(error: Exception) -> None:
    """Print the one line of an error, and exit with code 1."""
    if sys.stdout is not None:
        _flush()
    # The reader of our output has gone, or was never there.
    if isinstance(error, BrokenPipeError):
        sys.exit(1)
    # Other files that cannot be written have a name.
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
        line = f"cannot write to stdout: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror is not None:
        # An error of the operating system, whose text begins with "[Errno 2]".
        line = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    # MLX raises RuntimeError.
    elif isinstance(error, (ValueError, OSError, MemoryError, RuntimeError)):
        line = " ".join(str(error).split())
    elif sys.flags.dev_mode:
        raise error
    else:
        line = (
            f"unexpected {type(error).__name__}: {brief(error)}. Please report it, with what the same command prints "
            "if it begins with python -X dev -m flashmoe_mlx"
        )
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def _flush() -> OSError | None:
    """Flush stdout. If that fails, return why, and discard the rest: Python would complain again when it exits."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
