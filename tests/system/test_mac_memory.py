"""Free memory and memory pressure of a Mac, from a C library that is filled in."""

import ctypes
import mmap
import sys
from collections.abc import Callable

import mlx.core as mx
import psutil
import pytest

from flashmoe_mlx.model import budget
from flashmoe_mlx.model.budget import auto_budget, refuse_excess
from flashmoe_mlx.system import memory
from flashmoe_mlx.system.mac_memory import MacMemory, VmStatistics
from tests.support.libc import Libc

Pretend = Callable[[int, Libc], None]

GB = 10**9
TRUNK = 5_500_000_000


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Turns this machine into a Mac with some bytes of memory."""

    def pretend(total: int, libc: Libc) -> None:
        questions = MacMemory(libc)
        machine = psutil.virtual_memory()._replace(total=total, available=1)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
        monkeypatch.setattr(memory, "memory_limit", lambda root: None)
        monkeypatch.setattr(memory, "mac_memory", lambda: questions)

    return pretend


def test_layout_is_that_of_the_header() -> None:
    """Offsets of mach/vm_statistics.h; HOST_VM_INFO64_COUNT is 38."""
    assert ctypes.sizeof(VmStatistics) == 4 * 38
    offsets = {name: getattr(VmStatistics, name).offset for name in ("free", "wired", "purgeable", "speculative")}
    assert offsets == {"free": 0, "wired": 12, "purgeable": 88, "speculative": 92}
    offsets = {name: getattr(VmStatistics, name).offset for name in ("compressor", "external", "internal")}
    assert offsets == {"compressor": 128, "external": 136, "internal": 140}


def test_speculative_pages_count_once() -> None:
    statistics = VmStatistics(free=10, speculative=4, external=100, purgeable=3, active=1000, inactive=1000)
    assert statistics.reclaimable(16384) == (10 - 4 + 100 + 3) * 16384
    assert VmStatistics(speculative=4).reclaimable(16384) == 0


@pytest.mark.parametrize(
    ("total", "pages", "auto", "accepted"),
    [
        # Just downloaded: 34 GB of page cache, of which psutil sees half.
        (48, {"external": 34, "free": 0.2, "speculative": 0.2}, 13.5, True),
        (48, {"free": 32, "external": 5}, 15, True),
        # Programs have 27 GB.
        (48, {"free": 1, "external": 15}, 4.5, False),
        (128, {"free": 1, "external": 100, "purgeable": 2}, 46.75, True),
    ],
    ids=["just downloaded", "fresh boot", "overfull", "128 GB"],
)
def test_a_budget_of_20_gb(
    total: int, pages: dict[str, float], auto: float, accepted: bool, mac: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reserve of 1/32 stays: 1.5 GB of 48."""
    mac(total * GB, Libc(**{name: int(size * GB) for name, size in pages.items()}))
    assert memory.free_memory() == pytest.approx(2 * auto * GB + TRUNK, abs=1e6)
    if accepted:
        refuse_excess(TRUNK, 20 * GB)
    else:
        with pytest.raises(MemoryError, match=r"choose a ram_budget below 9\.0. GB"):
            refuse_excess(TRUNK, 20 * GB)
    monkeypatch.setattr(budget, "experts_nbytes", lambda tables: 217 * GB)
    assert auto_budget(TRUNK, []) == pytest.approx(auto * GB, abs=1e6)


def test_psutil_answers_where_the_kernel_does_not(mac: Pretend) -> None:
    mac(48 * GB, Libc(error=5, external=34 * GB))
    assert memory.free_memory() == 1


def test_available_memory_is_what_metal_leaves(mac: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that exist already count against Metal's limit."""
    mac(48 * GB, Libc(external=34 * GB))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 36 * GB})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 26 * GB)
    assert memory.available_memory() == 10 * GB
    assert memory.free_memory() > 32 * GB
    monkeypatch.setattr(mx, "get_active_memory", lambda: 40 * GB)
    assert memory.available_memory() == 0


@pytest.mark.parametrize(("level", "error", "short"), [(1, 0, False), (2, 0, True), (4, 0, True), (4, 1, False)])
def test_the_kernel_warns_by_its_level(level: int, error: int, short: bool, mac: Pretend) -> None:
    mac(48 * GB, Libc(level, error, external=34 * GB))
    assert memory.is_memory_short() == short


def test_the_port_is_asked_for_once() -> None:
    libc = Libc(external=34 * GB)
    questions = MacMemory(libc)
    assert questions.reclaimable() == questions.reclaimable() == libc.pages["external"] * mmap.PAGESIZE
    assert libc.ports == 1
    assert libc.mach_host_self.restype is ctypes.c_uint32


def test_other_systems_have_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not one that only says that it is a Mac."""
    assert MacMemory.of_this_machine() is None or sys.platform == "darwin"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert MacMemory.of_this_machine() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
    assert MacMemory.of_this_machine() is not None


def test_memory_is_never_short_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "mac_memory", lambda: None)
    assert not memory.is_memory_short()
    assert memory.free_memory() > 0
