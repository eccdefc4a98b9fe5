"""Ctrl-C where nobody catches it: while a command is imported, and when it is over."""

import os
import signal
import sys
from contextlib import suppress
from types import TracebackType
from typing import NoReturn


def leave(*_: object) -> NoReturn:
    """Say ``interrupted`` and end the process with exit code 130. What is still in buffers is lost.

    Python's own way out takes up to two seconds on a busy machine: it takes MLX and all libraries apart.
    """
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def leave_on_interrupt() -> None:
    """Let Ctrl-C end this process. A command does this before imports that take a second."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and shells want it in the background
        signal.signal(signal.SIGINT, leave)
        sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # it came just before one_line_errors began to listen
        leave()
    sys.__excepthook__(kind, error, trace)
