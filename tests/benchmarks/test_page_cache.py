"""Files leave the page cache, or a cold benchmark ends."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page_cache


class Libc:
    """A C library whose ``msync`` evicts what it is told to, and which says how much is cached."""

    def __init__(self, evicts: bool):
        self.evicts = evicts
        self.cached = True
        self.flags: list[int] = []

    def msync(self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, flags: int) -> int:
        assert address.value and nbytes.value == 100_000
        self.flags.append(flags)
        self.cached = not self.evicts
        return 0

    def mincore(self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, vector: ctypes.c_void_p) -> int:
        # Other bits than the lowest say other things on a Mac.
        ctypes.memset(vector, 0b111 if self.cached else 0b110, -(-nbytes.value // page_cache.mmap.PAGESIZE))
        return 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    return path


def on_a_mac(monkeypatch: pytest.MonkeyPatch, libc: Any) -> None:
    monkeypatch.setattr(page_cache.sys, "platform", "darwin")
    monkeypatch.setattr(page_cache.ctypes, "CDLL", lambda *_, **__: libc)


def test_a_mac_evicts_by_msync(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_mac(monkeypatch, libc := Libc(evicts=True))
    page_cache.evict([file])
    assert libc.flags == [2]


def test_a_file_that_stays_cached_is_not_measured_cold(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_mac(monkeypatch, Libc(evicts=False))
    assert not page_cache.can_evict([file])
    with pytest.raises(SystemExit, match="keeps 100% of"):
        page_cache.evict([file])


def test_what_was_read_is_cached(file: Path) -> None:
    page_cache.bring([file])
    assert page_cache.cached_share(file) == 1
