"""Files that change as a whole or not at all."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file to write instead of ``path``, which it becomes at the end.

    Whatever interrupts this, ``path`` is the old file, the new one, or still none. What a process that was killed
    left beside it is removed.

    Args:
        path (Path): what to write.
        mode (int): its permissions, of which the process's umask may take some.

    Raises:
        OSError: it cannot be written; says which file and why.
    """
    try:
        with _replacing(path, mode) as unfinished:
            yield unfinished
    except OSError as error:
        if error.strerror is None:  # no system's error: what was to be written could not be read
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[Path]:
    sweep(path.parent, f".{path.stem}.")
    unfinished, lock = _begin(path, mode)
    try:
        yield unfinished
        _fsync(unfinished)
        unfinished.replace(path)
        _fsync(path.parent)  # the new name too must outlive a power cut
    finally:
        os.close(lock)
        unfinished.unlink(missing_ok=True)


def _begin(path: Path, mode: int) -> tuple[Path, int]:
    """A new file, and the lock that tells others that somebody is still at it, which ends with the process."""
    while True:
        unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.unfinished{path.suffix}")
        lock = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        with suppress(OSError):  # the file system may know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink > 0:
            return unfinished, lock
        os.close(lock)  # a sweep was here before the lock


def sweep(folder: Path, beginning: str = ".") -> None:
    """Remove a folder's unfinished files that nobody is writing any more, of those whose names begin in some way."""
    for left in folder.iterdir():
        if left.name.startswith(beginning) and left.stem.endswith(".unfinished"):
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
