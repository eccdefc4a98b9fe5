"""Ctrl-C where Python would not end the process in time: during imports, inside MLX, and at exit."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn

_GRACE = 0.7
"""Seconds in which the main thread must react to Ctrl-C before the process is ended for it."""


def exit_interrupted(*_: object) -> NoReturn:
    """Print ``interrupted`` and end the process with exit code 130, without flushing buffers.

    Python's regular exit takes up to two seconds on a busy machine, because it tears down MLX and all libraries.
    """
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this process. To be called before imports that take a second.

    SIGINT stays ignored where it was, as nohup and shells want it for background processes.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, exit_interrupted)
        sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # Ctrl-C may raise KeyboardInterrupt just before one_line_errors() is entered.
    if issubclass(kind, KeyboardInterrupt):
        exit_interrupted()
    sys.__excepthook__(kind, error, trace)


@contextmanager
def watch_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, and end the process if that has no effect within a second.

    The main thread cannot react while it is inside MLX. A watching thread ends the process in that case.
    """
    # Only the main thread may handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGINT and not done.wait(_GRACE):
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                exit_interrupted()
        os.close(read_end)

    def report(unraisable: Any) -> None:
        # Python drops a KeyboardInterrupt that is raised in a finalizer. The watching thread has seen it.
        if unraisable.exc_type is not KeyboardInterrupt:
            report_before(unraisable)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    report_before, sys.unraisablehook = sys.unraisablehook, report
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler is exit_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if handler is exit_interrupted:
            signal.signal(signal.SIGINT, exit_interrupted)
        done.set()
        sys.unraisablehook = report_before
        signal.set_wakeup_fd(wakeup_before)
        os.close(write_end)
