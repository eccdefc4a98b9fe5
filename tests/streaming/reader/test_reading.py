"""Every byte arrives, from the page cache or from the device, in few reads."""

import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader
from tests.streaming.reader.reads import DATA, LARGE, SIZES, complete, plan


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_buffers_get_the_bytes_of_their_spans(threads: int, file: Path) -> None:
    counters = Counters()
    reader = Reader([str(file)], threads, counters)
    for sizes in (SIZES, SIZES[::-1], [7] * 50, [LARGE] * 20, []):
        reads = plan(file, sizes)
        before = counters.bytes_read
        reader.read(reads)
        assert complete(reads)
        assert counters.bytes_read - before == sum(sizes)
    assert counters.read_seconds > 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("ahead", [False, True])
def test_on_filled_is_called_once_with_complete_buffers(
    ahead: bool, cached: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that it raises is the error of the read."""
    reader = Reader([str(file)], 4, Counters())
    if not cached:
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, *flags: 0 if flags else preadv(fd, buffers, at))
    reads = plan(file, [*SIZES, *[LARGE] * 5])
    where = {id(buffer): number for number, (_, buffer) in enumerate(reads)}
    found: list[int] = []

    def on_filled(buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            assert complete([reads[where[id(buffer)]]])
            found.append(where[id(buffer)])

    def refuse(buffers: Sequence[memoryview]) -> None:
        raise OSError("not what it was")

    def run(then: Callable[[Sequence[memoryview]], None]) -> None:
        if ahead:
            reader.start(reads, then)()
        else:
            reader.read(reads, then)

    run(on_filled)
    assert sorted(found) == list(range(len(reads)))
    with pytest.raises(OSError, match="not what it was"):
        run(refuse)
    run(on_filled)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("size", [100, LARGE])
def test_truncated_file_is_an_error(size: int, threads: int, file: Path) -> None:
    reader = Reader([str(file)], threads, Counters())
    reads = plan(file, [size] * 3)
    # The last byte of the last read is gone.
    os.truncate(file, 13 * 3 + size - 1)
    with pytest.raises(OSError, match="truncated") as error:
        reader.read(reads)
    assert str(file) in str(error.value)
    assert "1 bytes" in str(error.value)
    assert "\n" not in str(error.value)
    Reader([str(file)], threads, Counters()).read(reads[:2])
    assert complete(reads[:2])


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Reader([str(tmp_path / "nowhere")], 2, Counters())


@pytest.mark.parametrize("threads", [1, 8])
def test_short_reads_are_completed(threads: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_partly_cached_reads_are_completed(
    threads: int, cached: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def contiguous(file: Path, sizes: Sequence[int]) -> list[tuple[Span, memoryview]]:
    """Return spans that are contiguous in the file, each with a buffer."""
    offsets = [13 + sum(sizes[:number]) for number in range(len(sizes))]
    spans = [Span(str(file), offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    return [(span, memoryview(bytearray(b"\xaa" * span.nbytes))) for span in spans]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that each call of preadv appends the sizes of its buffers to."""
    calls: list[list[int]] = []
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], *where: int) -> int:
        calls.append([len(buffer) for buffer in buffers])
        return preadv(fd, buffers, *where)

    monkeypatch.setattr(os, "preadv", read)
    return calls


@pytest.mark.parametrize("ahead", [False, True])
def test_contiguous_small_spans_are_one_read(ahead: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    reader = Reader([str(file)], 2, counters)
    calls = record_calls(monkeypatch)
    first, second = contiguous(file, [100, 7, 0, 5000]), contiguous(file, [40] * 10)
    reads = first + second
    reader.start(reads)() if ahead else reader.read(reads)
    assert complete(reads)
    assert calls == [[100, 7, 0, 5000], [40] * 10]
    assert counters.bytes_read == 5507


def test_other_spans_are_separate_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other")
    other.write_bytes(DATA)
    reader = Reader([str(file), str(other)], 1, Counters())
    calls = record_calls(monkeypatch)
    one, two, three = contiguous(file, [100, 50, 10])
    with_a_gap = [one, three]
    backwards = [two, one]
    overlap = [one, (Span(str(file), 100, 50), memoryview(bytearray(50)))]
    elsewhere = [one, (Span(str(other), two[0].offset, 50), memoryview(bytearray(50)))]
    for reads in (with_a_gap, backwards, overlap, elsewhere):
        calls.clear()
        reader.read(reads)
        assert complete(reads)
        assert len(calls) == 2
    calls.clear()
    large = contiguous(file, [LARGE] * 7)
    reader.read(large)
    assert complete(large)
    # At most 1 MiB is merged.
    assert calls == [[LARGE] * 4, [LARGE] * 3]
    calls.clear()
    many = contiguous(file, [1] * (os.sysconf("SC_IOV_MAX") + 5))
    # The OS refuses more buffers in one call.
    reader.read(many)
    assert complete(many)
    assert len(calls) == 2


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
@pytest.mark.parametrize("cached", [0, 1, 99, 100, 101, 107, 5106])
def test_partly_cached_merged_read_is_completed(cached: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached part ends inside a buffer, between two, or with the last byte but one."""
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
    reads = contiguous(file, [100, 7, 0, 5000])
    reader.read(reads)
    assert complete(reads)
    assert rest == [5107 - cached]


def test_truncated_merged_read_is_an_error(file: Path) -> None:
    reads = contiguous(file, [100, 7, 5000])
    reader = Reader([str(file)], 2, Counters())
    os.truncate(file, 13 + 5107 - 2)
    with pytest.raises(OSError, match="ends 2 bytes too early"):
        reader.read(reads)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the OS does not tell what is cached")
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("ahead", [False, True])
def test_device_reads_in_flight_are_as_many_as_threads(
    ahead: bool, size: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader([str(file)], 8, Counters())
    preadv = os.preadv
    barrier = threading.Barrier(8, timeout=5)

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        # Until seven others are here.
        barrier.wait()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, [size] * 16)
    reader.start(reads)() if ahead else reader.read(reads)
    assert complete(reads)


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("ahead", [False, True])
def test_all_threads_read_where_the_os_does_not_tell_what_is_cached(
    ahead: bool, size: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are cores, and more than copies from the page cache would use."""
    preadv = os.preadv
    barrier = threading.Barrier(16, timeout=5)
    readers: set[threading.Thread] = set()

    def without_flags(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return preadv(fd, buffers, offset)

    def read(fd: int, buffers: Sequence[Any], offset: int) -> int:
        readers.add(threading.current_thread())
        # Until fifteen others are here.
        barrier.wait()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", without_flags)
    reader = Reader([str(file)], 16, Counters())
    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, [size] * 32)
    reader.start(reads)() if ahead else reader.read(reads)
    assert complete(reads)
    assert len(readers) == 16
    assert threading.current_thread() not in readers


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_refused_advice_about_readahead_is_no_error(platform: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for module, name in ((fcntl, "fcntl"), (os, "posix_fadvise")):
        monkeypatch.setattr(module, name, refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_RANDOM", 1, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    reads = plan(file, SIZES)
    Reader([str(file)], 2, Counters()).read(reads)
    assert complete(reads)


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_readahead_is_disabled(platform: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    for module, name in ((fcntl, "fcntl"), (os, "posix_fadvise")):
        monkeypatch.setattr(module, name, lambda fd, *call: calls.append((os.fstat(fd).st_ino, *call)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_RANDOM", 1, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    Reader([str(file)], 1, Counters())
    # 45 is F_RDAHEAD.
    assert calls == [(file.stat().st_ino, *((45, 0) if platform == "darwin" else (0, 0, 1)))]


@pytest.mark.parametrize("threads", [1, 8])
def test_file_system_without_cached_reads(threads: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reads = plan(file, SIZES)
    Reader([str(file)], threads, Counters()).read(reads)
    assert complete(reads)


def test_failed_constructor_closes_its_files(file: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Reader([str(file), str(file.with_name("nowhere"))], 2, Counters())
    assert not any(path.exists() and path.samefile(file) for path in Path("/dev/fd").iterdir())


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_start_returns_at_once_and_counts_real_waits(threads: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Returns, although nothing can be read yet.
    finish = reader.start(iter(reads))
    assert counters == Counters()
    gate.set()
    time.sleep(0.1)
    assert complete(reads)
    finish()
    assert counters.bytes_read == sum(SIZES) * 3
    # Only the time really waited.
    assert 0 < counters.read_seconds < 0.1
    assert threading.main_thread() not in readers
    reader.start([])()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("cold", [True, False])
def test_read_does_not_wait_for_prefetches(
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
def test_failed_prefetch_raises_when_waited_for(cold: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Some reads were dropped.
    assert not cold or b"\xaa" * LARGE in before[1:]
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


def test_reader_dropped_while_threads_read_closes_its_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
