"""Writes files completely or not at all."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of a file to write, which replaces ``path`` at the end.

    Whenever this is interrupted, ``path`` is the old file, the new file, or still missing. Files that killed processes
    left next to it are removed.

    Args:
        path (Path): The file to write.
        mode (int): Its permissions, reduced by the umask. Default: ``0o666``.

    Raises:
        OSError: It cannot be written, or is not a file: a device must not be replaced by one.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a folder or a device, give the path of a file")
    try:
        with _replacing(path, mode) as unfinished:
            yield unfinished
    except OSError as error:
        # Without strerror it is not the system's error, but one of the caller, who could not read what to write.
        if error.strerror is None:
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
        # The new name, too, must survive a power cut.
        _fsync(path.parent)
    finally:
        os.close(lock)
        unfinished.unlink(missing_ok=True)


def _begin(path: Path, mode: int) -> tuple[Path, int]:
    """Create a file, and lock it until the process ends, so that no other process sweeps it."""
    while True:
        unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.unfinished{path.suffix}")
        lock = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        # Some file systems do not support locks.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweep may have removed the file before it was locked.
        if os.fstat(lock).st_nlink > 0:
            return unfinished, lock
        os.close(lock)


def sweep(folder: Path, beginning: str = ".") -> None:
    """Remove the unfinished files of a folder that no process is writing.

    Args:
        folder (Path): The folder.
        beginning (str): Only files whose names begin like this. Default: ``"."``.
    """
    for left in folder.iterdir():
        if left.name.startswith(beginning) and left.stem.endswith(".unfinished"):
            # It may be another user's, or gone by now.
            with suppress(OSError):
                lock = os.open(left, os.O_RDWR)
                try:
                    if _lock(lock):
                        left.unlink()
                finally:
                    os.close(lock)


def _lock(file: int) -> bool:
    """Lock a file, and return False if another process holds the lock or the file system does not support locks."""
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
