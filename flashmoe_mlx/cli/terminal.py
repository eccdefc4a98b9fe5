"""Text for people: answers on stdout, everything else dimmed on stderr."""

import os
import sys
from typing import TextIO

# Control characters but tab and line feed: a model could command the terminal with them.
_REPLACED = str.maketrans(dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd"))


def open_standard_streams() -> None:
    """Open stdin and stderr where the caller closed them (``<&-``), so that reads are empty and notes go nowhere.

    The descriptors 0 to 2 are in use afterwards: a file of ours that got one of them would receive what libraries
    print. Python's ``sys.stdout`` stays ``None`` where it was closed, because an answer must not be lost silently.
    """
    # The system gives the lowest descriptor that is free.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # They stay open as long as the process.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def write(file: TextIO, text: str, dimmed: bool = False) -> None:
    """Write and flush a text; on a terminal, without control characters, and dimmed if wanted."""
    if file.isatty():
        text = text.translate(_REPLACED)
        text = f"\x1b[2m{text}\x1b[0m" if dimmed else text
    file.write(text)
    file.flush()


def end_line(file: TextIO, text: str) -> None:
    """End the line that a text, which was written before, has begun."""
    if text and not text.endswith("\n"):
        write(file, "\n")


def note(text: str) -> None:
    """Write a dimmed line to stderr."""
    write(sys.stderr, text, dimmed=True)
    write(sys.stderr, "\n")
