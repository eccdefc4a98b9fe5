"""A read that fails raises ReadError, and no thread writes to its buffers afterwards."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.streaming import read_batch
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.read_error import ReadError
from flashmoe_mlx.streaming.reader import Reader
from tests.streaming.reader.reads import DATA, LARGE, SIZES, Preadv, complete, plan


def fail_in(main: bool, preadv: Preadv) -> Preadv:
    """Return a preadv that fails in the main thread or in the others, and is slow where it does not fail."""

    def read(fd: int, buffers: Sequence[Any], *where: int) -> int:
        if (threading.current_thread() is threading.main_thread()) == main:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.05)
        return preadv(fd, buffers, *where)

    return read


def test_device_error_raises_and_leaves_buffers_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    reader = Reader([str(file)], 4, counters)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", fail_in(False, preadv))
    reads = plan(file, [LARGE] * 12)
    with pytest.raises(ReadError, match="Input/output error") as error:
        reader.read(reads)
    before = [bytes(buffer) for _, buffer in reads]
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert (error.value.path, error.value.errno) == (str(file), errno.EIO)
    assert (error.value.offset, error.value.wanted) in [(span.offset, span.nbytes) for span, _ in reads]
    assert not complete(reads)
    assert counters.bytes_read == 0

    # Long enough for a read that was not waited for.
    time.sleep(0.2)
    assert [bytes(buffer) for _, buffer in reads] == before
    monkeypatch.setattr(os, "preadv", preadv)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
def test_error_of_a_cached_read_is_retried_by_another_thread(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader([str(file)], 4, Counters())
    monkeypatch.setattr(os, "preadv", fail_in(True, os.preadv))
    reads = plan(file, [LARGE, 7] * 3)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("knows_cached", [True, False])
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR])
def test_transient_error_is_retried(
    code: int, size: int, knows_cached: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the device that goes away, or a signal."""
    reader = Reader([str(file)], 4, Counters())
    reader._knows_cached &= knows_cached
    preadv = os.preadv
    failed: set[int] = set()

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        if offset not in failed:
            failed.add(offset)
            raise OSError(code, os.strerror(code))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, [size] * 12)
    reader.read(reads)
    assert complete(reads)
    assert len(failed) == 12


def test_failed_small_read_stops_large_ones(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader([str(file)], 4, Counters())
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], *where: int) -> int:
        if len(buffers[0]) < LARGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.05)
        return preadv(fd, buffers, *where)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, [100, *[LARGE] * 9])
    with pytest.raises(ReadError, match="Input/output error"):
        reader.read(reads)
    before = [bytes(buffer) for _, buffer in reads]
    time.sleep(0.2)
    assert [bytes(buffer) for _, buffer in reads] == before


@pytest.mark.parametrize("change", ["bytes", "time", "other file", "gone", "longer"])
@pytest.mark.parametrize("ahead", [False, True])
def test_file_that_changed_since_it_was_opened_is_refused(ahead: bool, change: str, file: Path) -> None:
    reader = Reader([str(file)], 2, Counters())
    reads = plan(file, SIZES)
    other = file.with_name("other")
    other.write_bytes(DATA)
    if change == "bytes":
        with file.open("r+b") as stream:
            stream.write(b"x")
        # The file system's clock may be too coarse to show the change.
        os.utime(file, ns=(1, 1))
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "other file":
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        other.replace(file)
    elif change == "gone":
        file.unlink()
    else:
        os.truncate(file, len(DATA) + 1)
    with pytest.raises(ReadError, match="since the model was loaded") as error:
        reader.start(reads)() if ahead else reader.read(reads)
    assert (error.value.path, error.value.got) == (str(file), error.value.wanted)
    if change != "gone":
        Reader([str(file)], 2, Counters()).read(reads)


def test_relative_path_survives_a_change_of_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    reader = Reader([file.name], 2, Counters())
    monkeypatch.chdir("/")
    reads = plan(Path(file.name), SIZES)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("knows_cached", [True, False])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [100, LARGE])
def test_stuck_read_fails_and_blocks_only_its_buffer(
    size: int, ahead: bool, knows_cached: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time. Other buffers can be read to meanwhile, and this one when the read is back."""
    monkeypatch.setattr(read_batch, "_STOP_SECONDS", 0.05)
    reader = Reader([str(file)], 2, Counters(), timeout=0.1)
    reader._knows_cached &= knows_cached
    reads, others = plan(file, [size] * 6), plan(file, [size] * 6)
    stuck = id(reads[2][1].obj)
    preadv = os.preadv
    gate = threading.Event()

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if id(buffers[0].obj) == stuck:
            if flags:
                raise BlockingIOError
            assert gate.wait(10)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    # More stuck reads than threads.
    for _ in range(3):
        with pytest.raises(ReadError, match="no progress for") as error:
            reader.start(reads)() if ahead else reader.read(reads)
        assert (error.value.offset, error.value.wanted, error.value.got) == (reads[2][0].offset, size, 0)
        assert [number for number, (_, buffer) in enumerate(reads) if reader.writes([buffer])] == [2]
        reader.start(others)() if ahead else reader.read(others)
        assert complete(others)
    gate.set()
    deadline = time.monotonic() + 5
    while reader.writes([reads[2][1]]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reader.read(reads)
    assert complete(reads)


def test_stuck_read_does_not_keep_the_process_alive(file: Path) -> None:
    program = """
import os, sys, time
from flashmoe_mlx.checkpoint.folder import Span
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader

reader = Reader([sys.argv[1]], 2, Counters(), timeout=0.2)
os.preadv = lambda *_: time.sleep(60)
reader._knows_cached = False
reader.read([(Span(sys.argv[1], 0, 5), memoryview(bytearray(5)))])
"""
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    error = "flashmoe_mlx.streaming.read_error.ReadError: no progress for 0.2 s"
    assert ended.stderr.splitlines()[-1].startswith(error)
    assert time.monotonic() - begin < 20


def test_buffers_in_use_are_known_after_a_second_interrupt(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the reader waits for its threads after the first."""
    reader = Reader([str(file)], 2, Counters())
    reads = plan(file, [LARGE] * 12)
    preadv = os.preadv

    def slow(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        time.sleep(0.2)
        return preadv(fd, buffers, offset)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", slow)
    with monkeypatch.context() as patch:
        patch.setattr(read_batch.Batch, "wait", lambda _: time.sleep(0.05) or interrupted())
        patch.setattr(read_batch.Batch, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.read(reads)
    assert reader.writes([buffer for _, buffer in reads])
    deadline = time.monotonic() + 10
    while reader.writes([buffer for _, buffer in reads]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = [bytes(buffer) for _, buffer in reads]
    time.sleep(0.3)
    assert [bytes(buffer) for _, buffer in reads] == before
