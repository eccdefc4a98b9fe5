"""Ctrl-C where nobody catches it: while a command is imported, and when it is over."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn


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


_HEARING = 0.7  # seconds that the main thread has for an interrupt


@contextmanager
def _prompt_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process within a second, even if the main thread is inside MLX and does not hear it."""
    if threading.current_thread() is not threading.main_thread():  # whose signals these are
        yield
        return
    over = threading.Event()
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        while number := os.read(ear, 1):
            if number[0] == signal.SIGINT and not over.wait(_HEARING):
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                leave()
        os.close(ear)

    def report(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:  # Python drops one that meets a finalizer, listen() does not
            report_before(unraisable)

    threading.Thread(target=listen, name="interrupts", daemon=True).start()
    ear_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    report_before, sys.unraisablehook = sys.unraisablehook, report
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if handler is leave:
            signal.signal(signal.SIGINT, leave)
        over.set()
        sys.unraisablehook = report_before
        signal.set_wakeup_fd(ear_before)
        os.close(mouth)
