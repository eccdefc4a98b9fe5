"""Files that change as a whole or not at all."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``, which it becomes at the end.

    Whatever interrupts this, ``path`` is the old file, the new one, or still none. What a process that was killed
    left beside it is removed.

    Raises:
        OSError: it cannot be written; says which file and why.
    """
    try:
        with _replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        if error.strerror is None:  # no system's error: what was to be written could not be read
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    _sweep(path)
    unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.unfinished{path.suffix}")
    # The lock tells others that somebody is still at it. It ends with the process, however that ends.
    lock = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _locked(lock)
        yield unfinished
        _fsync(unfinished)
        unfinished.replace(path)
        _fsync(path.parent)  # the new name too must outlive a power cut
    finally:
        os.close(lock)
        unfinished.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove unfinished files that nobody is writing any more."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.stem}.") and left.name.endswith(f".unfinished{path.suffix}"):
            with suppress(OSError):  # another's, or just gone
                lock = os.open(left, os.O_RDWR)
                try:
                    if _locked(lock):
                        left.unlink()
                finally:
                    os.close(lock)


def _locked(file: int) -> bool:
    """Lock a file, or tell that it is another's, or that its file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
