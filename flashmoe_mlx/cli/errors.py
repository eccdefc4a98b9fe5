"""Errors that a user can fix become one line, and Ctrl-C exit code 130."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flashmoe_mlx.cli.interrupts import exit_interrupted, watch_interrupts


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one line and exit code 1, Ctrl-C into 130, and a closed pipe into silence.

    Every command's ``main()`` is decorated with it.
    """
    try:
        with watch_interrupts():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        if signal.getsignal(signal.SIGINT) is exit_interrupted:
            exit_interrupted()
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    # MLX raises RuntimeError.
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    reason = str(error)
    # An OSError of the operating system, whose text begins with "[Errno 2]".
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"{error.filename}: {error.strerror}"
    return " ".join(reason.split())
