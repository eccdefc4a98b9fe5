"""Every byte arrives or an OSError does, and then no thread is still writing."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe_mlx import reader as reader_module
from flashmoe_mlx.checkpoint import Span
from flashmoe_mlx.counters import Counters
from flashmoe_mlx.reader import Reader, ReadError

LARGE = 1 << 18  # bytes; threads share the work
DATA = np.random.default_rng(0).bytes(8 * LARGE)

Preadv = Callable[..., int]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DATA)
    return path


def plan(file: Path, sizes: Sequence[int]) -> list[tuple[Span, memoryview]]:
    """Reads of these sizes from odd offsets, each with a buffer."""
    return [
        (Span(str(file), 13 * number, size), memoryview(bytearray(b"\xaa" * size)))
        for number, size in enumerate(sizes, 1)
    ]


def complete(reads: Sequence[tuple[Span, memoryview]]) -> bool:
    return all(buffer == DATA[span.offset : span.offset + span.nbytes] for span, buffer in reads)


SIZES = [1, LARGE, 4096, LARGE + 7, 0, 3 * LARGE, LARGE - 1, 2 * LARGE, 5]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bytes(threads: int, file: Path) -> None:
    counters = Counters()
    reader = Reader([str(file)], threads, counters)
    for sizes in (SIZES, SIZES[::-1], [7] * 50, [LARGE] * 20, []):
        reads = plan(file, sizes)
        before = counters.bytes_read
        reader.read(reads)
        assert complete(reads)
        assert counters.bytes_read - before == sum(sizes)
    assert counters.read_seconds > 0


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("size", [100, LARGE])
def test_truncated_file(size: int, threads: int, file: Path) -> None:
    reader = Reader([str(file)], threads, Counters())
    reads = plan(file, [size] * 3)
    os.truncate(file, 13 * 3 + size - 1)  # the last byte of the last read is gone
    with pytest.raises(OSError, match="truncated") as error:
        reader.read(reads)
    assert str(file) in str(error.value)
    assert "1 bytes" in str(error.value)
    assert "\n" not in str(error.value)
    Reader([str(file)], threads, Counters()).read(reads[:2])
    assert complete(reads[:2])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Reader([str(tmp_path / "nowhere")], 2, Counters())


@pytest.mark.parametrize("threads", [1, 8])
def test_short_reads(threads: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OS may give fewer bytes than were asked for."""
    preadv = os.preadv
    sizes = [1, 7, 8, 1000]
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *where: preadv(fd, [buffers[0][:7]], *where))
    reads = plan(file, sizes)
    Reader([str(file)], threads, Counters()).read(reads)
    assert complete(reads)
    step = LARGE // 3
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *where: preadv(fd, [buffers[0][:step]], *where))
    reads = plan(file, SIZES)
    Reader([str(file)], threads, Counters()).read(reads)
    assert complete(reads)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("cached", [0, 5, 1000])
def test_partly_cached(threads: int, cached: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache has the first bytes of a read, or nothing."""
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags and not cached:
            raise BlockingIOError
        return preadv(fd, [buffers[0][: cached if flags else None]], offset)

    reader = Reader([str(file)], threads, Counters())
    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, SIZES * 3)
    reader.read(reads)
    assert complete(reads)


def neighbours(file: Path, sizes: Sequence[int]) -> list[tuple[Span, memoryview]]:
    """Reads that follow one another in the file."""
    offsets = [13 + sum(sizes[:number]) for number in range(len(sizes))]
    spans = [Span(str(file), offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    return [(span, memoryview(bytearray(b"\xaa" * span.nbytes))) for span in spans]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes of the buffers of each preadv from now on."""
    calls: list[list[int]] = []
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], *where: int) -> int:
        calls.append([len(buffer) for buffer in buffers])
        return preadv(fd, buffers, *where)

    monkeypatch.setattr(os, "preadv", read)
    return calls


@pytest.mark.parametrize("ahead", [False, True])
def test_neighbours_are_read_at_once(ahead: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    reader = Reader([str(file)], 2, counters)
    calls = record_calls(monkeypatch)
    first, second = neighbours(file, [100, 7, 0, 5000]), neighbours(file, [40] * 10)
    reads = first + second
    reader.start(reads)() if ahead else reader.read(reads)
    assert complete(reads)
    assert calls == [[100, 7, 0, 5000], [40] * 10]
    assert counters.bytes_read == 5507


def test_what_is_not_read_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other")
    other.write_bytes(DATA)
    reader = Reader([str(file), str(other)], 1, Counters())
    calls = record_calls(monkeypatch)
    one, two, three = neighbours(file, [100, 50, 10])
    apart = [one, three]  # a gap
    backwards = [two, one]
    overlap = [one, (Span(str(file), 100, 50), memoryview(bytearray(50)))]
    elsewhere = [one, (Span(str(other), two[0].offset, 50), memoryview(bytearray(50)))]
    for reads in (apart, backwards, overlap, elsewhere):
        calls.clear()
        reader.read(reads)
        assert complete(reads)
        assert len(calls) == 2
    calls.clear()
    large = neighbours(file, [LARGE] * 7)
    reader.read(large)
    assert complete(large)
    assert calls == [[LARGE] * 4, [LARGE] * 3]  # 1 MiB
    calls.clear()
    many = neighbours(file, [1] * (os.sysconf("SC_IOV_MAX") + 5))
    reader.read(many)  # the OS refuses more buffers
    assert complete(many)
    assert len(calls) == 2


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
@pytest.mark.parametrize("cached", [0, 1, 99, 100, 101, 107, 5106])
def test_partly_cached_neighbours(cached: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the page cache ends inside a buffer, between two or with the last byte but one."""
    reader = Reader([str(file)], 2, Counters())
    preadv = os.preadv
    rest: list[int] = []

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if not flags:
            rest.append(sum(map(len, buffers)))
            return preadv(fd, buffers, offset)
        if not cached:
            raise BlockingIOError
        some = bytearray(cached)
        preadv(fd, [some], offset)
        for buffer in buffers:
            buffer[: len(some)] = some[: len(buffer)]
            some = some[len(buffer) :]
        return cached

    monkeypatch.setattr(os, "preadv", read)
    reads = neighbours(file, [100, 7, 0, 5000])
    reader.read(reads)
    assert complete(reads)
    assert rest == [5107 - cached]


def test_truncated_within_neighbours(file: Path) -> None:
    reads = neighbours(file, [100, 7, 5000])
    reader = Reader([str(file)], 2, Counters())
    os.truncate(file, 13 + 5107 - 2)
    with pytest.raises(OSError, match="ends 2 bytes too early"):
        reader.read(reads)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_device_has_as_many_reads_as_there_are_threads(
    ahead: bool, size: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader([str(file)], 8, Counters())
    preadv = os.preadv
    barrier = threading.Barrier(8, timeout=5)

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        barrier.wait()  # for seven others
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, [size] * 16)
    reader.start(reads)() if ahead else reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_no_readahead(platform: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    for module, name in ((fcntl, "fcntl"), (os, "posix_fadvise")):
        monkeypatch.setattr(module, name, lambda fd, *call: calls.append((os.fstat(fd).st_ino, *call)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_RANDOM", 1, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    Reader([str(file)], 1, Counters())
    assert calls == [(file.stat().st_ino, *((45, 0) if platform == "darwin" else (0, 0, 1)))]  # 45 is F_RDAHEAD


@pytest.mark.parametrize("threads", [1, 8])
def test_file_system_that_does_not_tell_what_is_cached(
    threads: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, SIZES)
    Reader([str(file)], threads, Counters()).read(reads)
    assert complete(reads)


def fail_in(main: bool, preadv: Preadv) -> Preadv:
    """A device error in the calling thread or in the others; whoever does not fail is slow."""

    def read(fd: int, buffers: Sequence[Any], *where: int) -> int:
        if (threading.current_thread() is threading.main_thread()) == main:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.05)
        return preadv(fd, buffers, *where)

    return read


def test_device_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    time.sleep(0.2)  # long enough for a read that somebody forgot
    assert [bytes(buffer) for _, buffer in reads] == before
    monkeypatch.setattr(os, "preadv", preadv)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
def test_error_of_a_cached_read_is_looked_into_by_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader([str(file)], 4, Counters())
    monkeypatch.setattr(os, "preadv", fail_in(True, os.preadv))
    reads = plan(file, [LARGE, 7] * 3)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("knows_cached", [True, False])
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR])
def test_once(code: int, size: int, knows_cached: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the device that goes away, and signals, do no harm."""
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


def test_small_read_fails_while_large_ones_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_changed_file(ahead: bool, change: str, file: Path) -> None:
    reader = Reader([str(file)], 2, Counters())
    reads = plan(file, SIZES)
    other = file.with_name("other")
    other.write_bytes(DATA)
    if change == "bytes":
        with file.open("r+b") as stream:
            stream.write(b"x")
        os.utime(file, ns=(1, 1))  # a clock that is too coarse to tell is not what is tested here
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


def test_relative_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    reader = Reader([file.name], 2, Counters())
    monkeypatch.chdir("/")
    reads = plan(Path(file.name), SIZES)
    reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("knows_cached", [True, False])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [100, LARGE])
def test_stuck(size: int, ahead: bool, knows_cached: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails in time, its buffer stays taken until the read is back, and others are read meanwhile."""
    monkeypatch.setattr(reader_module, "_PATIENCE", 0.05)
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
    for _ in range(3):  # more of them than there are threads
        with pytest.raises(ReadError, match="no answer for") as error:
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


def test_a_stuck_read_does_not_keep_the_process(file: Path) -> None:
    program = """
import os, sys, time
from flashmoe_mlx.checkpoint import Span
from flashmoe_mlx.counters import Counters
from flashmoe_mlx.reader import Reader

reader = Reader([sys.argv[1]], 2, Counters(), timeout=0.2)
os.preadv = lambda *_: time.sleep(60)
reader._knows_cached = False
reader.read([(Span(sys.argv[1], 0, 5), memoryview(bytearray(5)))])
"""
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("flashmoe_mlx.reader.ReadError: no answer for 0.2 s")
    assert time.monotonic() - begin < 20


def test_interrupted_again_while_it_stops(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is thrown at it, it tells which buffers are still written to."""
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
        patch.setattr(reader_module._Batch, "wait", lambda _: time.sleep(0.05) or interrupted())
        patch.setattr(reader_module._Batch, "stop", interrupted)
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


def test_failed_constructor_closes_its_files(file: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Reader([str(file), str(file.with_name("nowhere"))], 2, Counters())
    assert not any(path.exists() and path.samefile(file) for path in Path("/dev/fd").iterdir())


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_start(threads: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    reader = Reader([str(file)], threads, counters)
    preadv = os.preadv
    readers: set[threading.Thread] = set()
    gate = threading.Event()

    def read(*call: Any) -> int:
        readers.add(threading.current_thread())
        assert gate.wait(5)
        return preadv(*call)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, SIZES * 3)
    finish = reader.start(iter(reads))  # returns although nothing can be read yet
    assert counters == Counters()
    gate.set()
    time.sleep(0.1)
    assert complete(reads)
    finish()
    assert counters.bytes_read == sum(SIZES) * 3
    assert 0 < counters.read_seconds < 0.1  # only what was really waited for
    assert threading.main_thread() not in readers
    reader.start([])()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("cold", [True, False])
def test_read_does_not_wait_for_what_was_started(
    cold: bool, threads: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters()
    reader = Reader([str(file)], threads, counters)
    ahead, other, now = plan(file, SIZES * 3), plan(file, SIZES * 2), plan(file, SIZES * 3)
    held = {id(buffer.obj) for _, buffer in ahead + other}
    preadv = os.preadv
    gate = threading.Event()

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if cold and flags:
            raise BlockingIOError
        assert id(buffers[0].obj) not in held or gate.wait(5)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    finish, finish_other = reader.start(ahead), reader.start(other)
    reader.read(now)
    assert complete(now)
    assert not complete(ahead)
    assert counters.bytes_read == sum(SIZES) * 3
    gate.set()
    finish_other()
    finish()
    assert complete(ahead)
    assert complete(other)
    assert counters.bytes_read == sum(SIZES) * 8


@pytest.mark.parametrize("cold", [True, False])
def test_start_fails(cold: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    reader = Reader([str(file)], 4, counters)
    reads = plan(file, [LARGE] * 12)
    first = id(reads[0][1].obj)
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if cold and flags:
            raise BlockingIOError
        if id(buffers[0].obj) == first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.05)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    finish = reader.start(reads)
    with pytest.raises(OSError, match="Input/output error"):
        finish()
    before = [bytes(buffer) for _, buffer in reads]
    assert not cold or b"\xaa" * LARGE in before[1:]  # some were given up
    assert counters == Counters()
    time.sleep(0.1)
    assert [bytes(buffer) for _, buffer in reads] == before
    monkeypatch.setattr(os, "preadv", preadv)
    reader.start(reads)()
    assert complete(reads)


def test_files_are_closed_with_the_reader(file: Path) -> None:
    before = set(threading.enumerate())
    reader = Reader([str(file)], 4, Counters())
    reader.read(plan(file, [LARGE] * 8))
    opened = [path for path in Path("/dev/fd").iterdir() if path.exists() and path.samefile(file)]
    assert len(opened) == 1
    reader.start(plan(file, [LARGE] * 8))()
    workers = set(threading.enumerate()) - before
    del reader
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    assert not any(path.exists() and path.samefile(file) for path in Path("/dev/fd").iterdir())


def test_reader_and_handle_dropped_while_threads_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    before = set(threading.enumerate())
    reader = Reader([str(file)], 2, Counters())
    monkeypatch.setattr(os, "preadv", lambda *call: time.sleep(0.01) or preadv(*call))
    reads = plan(file, [LARGE] * 8)
    reader.start(reads)
    workers = set(threading.enumerate()) - before
    del reader
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    assert complete(reads)
    assert not any(path.exists() and path.samefile(file) for path in Path("/dev/fd").iterdir())
