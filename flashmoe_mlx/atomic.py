"""Files that change as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``, which it becomes at the end.

    Whatever interrupts this, ``path`` is the old file, the new one, or still none.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        _fsync(unfinished)
        unfinished.replace(path)
        _fsync(path.parent)  # the new name too must outlive a power cut
    finally:
        unfinished.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
