"""Turn errors that a user can fix into one line, and Ctrl-C into exit code 130."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flashmoe_mlx.cli.interrupts import _prompt_interrupts, leave


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1, Ctrl-C into 130, and a closed pipe into silence."""
    try:
        with _prompt_interrupts():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        if signal.getsignal(signal.SIGINT) is leave:
            leave()
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # MLX's own are RuntimeErrors
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # the system's own, which begins "[Errno 2]"
            reason = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(1)
