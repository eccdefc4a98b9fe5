"""Text for people: answers on stdout, everything else dimmed on stderr."""

import sys
from typing import TextIO

# Control characters but tab and line feed: a model could command the terminal with them.
_REPLACED = str.maketrans(dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd"))


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
