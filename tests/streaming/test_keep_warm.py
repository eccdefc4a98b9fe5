"""A GPU is kept warm while the host waits for the disk, at no other time, and to no effect on the output."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import psutil
import pytest

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.config import Config
from flashmoe_mlx.model import budget, swap
from flashmoe_mlx.streaming import keep_warm as keep_warm_module
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.keep_warm import KeepWarm, make_keep_warm
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.system.power import on_battery
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, Run, assert_same, run, streamed

Expected = Callable[[Path], Run]


class Recorded(KeepWarm):
    """Notes when it is launched, and by which thread."""

    def __init__(self, on_battery: Callable[[], bool] | None = None, interval: float = KeepWarm.interval):
        super().__init__(mx.Device(mx.cpu), on_battery)
        self.interval = interval
        self.times: list[float] = []
        self.threads: set[threading.Thread] = set()

    def _launch(self) -> None:
        self.times.append(time.perf_counter())
        self.threads.add(threading.current_thread())
        super()._launch()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(range(256)))
    return path


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached, and a read takes 50 ms."""
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        time.sleep(0.05)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


def read(file: Path, keep_warm: KeepWarm | None, ahead: bool = False, nbytes: int = 200) -> tuple[float, float]:
    """Read once, and return when the call began and ended."""
    reader = Reader([str(file)], 2, Counters(), keep_warm=keep_warm)
    buffer = memoryview(bytearray(nbytes))
    begin = time.perf_counter()
    reads = [(Span(str(file), 3, nbytes), buffer)]
    reader.start(reads)() if ahead else reader.read(reads)
    assert buffer == file.read_bytes()[3 : 3 + nbytes]
    return begin, time.perf_counter()


@pytest.mark.parametrize("ahead", [False, True])
def test_products_run_only_while_the_calling_thread_waits(ahead: bool, file: Path, slow_disk: None) -> None:
    warm = Recorded()
    begin, end = read(file, warm, ahead)
    time.sleep(0.01)
    assert len(warm.times) > 5
    assert begin < warm.times[0] and warm.times[-1] < end
    assert warm.threads == {threading.current_thread()}
    # None is launched faster than once in an interval.
    gaps = [later - earlier for earlier, later in zip(warm.times, warm.times[1:], strict=False)]
    assert min(gaps) >= 0.9 * warm.interval


def test_no_product_runs_if_nothing_is_waited_for(file: Path) -> None:
    warm = Recorded(interval=1)
    read(file, warm)
    assert warm.times == []


def test_a_wait_ends_with_its_last_read(file: Path, slow_disk: None) -> None:
    """Not at the end of an interval."""
    begin, end = read(file, Recorded(interval=30))
    assert end - begin < 5


def test_a_stuck_read_is_noticed_in_time_as_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    warm = Recorded()
    reader = Reader([str(file)], 1, Counters(), timeout=0.1, keep_warm=warm)
    reader._knows_cached = False
    monkeypatch.setattr(os, "preadv", lambda *call: gate.wait(10) and 0)
    with pytest.raises(OSError, match="no progress for"):
        reader.read([(Span(str(file), 0, 5), memoryview(bytearray(5)))])
    gate.set()
    assert warm.times


def test_nothing_runs_on_battery(file: Path, slow_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    battery = [True]
    looks: list[float] = []
    warm = Recorded(lambda: bool(looks.append(0)) or battery[0])
    for _ in range(3):
        read(file, warm)
    # The power supply is looked at rarely.
    assert (warm.times, len(looks)) == ([], 1)
    battery[0] = False
    read(file, warm)
    assert warm.times == []
    monkeypatch.setattr(keep_warm_module, "_POWER_SECONDS", 0.0)
    warm._next_look = 0.0
    read(file, warm)
    assert warm.times


@pytest.mark.parametrize(
    ("battery", "expected"),
    [
        (None, False),
        (SimpleNamespace(power_plugged=True), False),
        (SimpleNamespace(power_plugged=False), True),
        (SimpleNamespace(power_plugged=None), False),
    ],
)
def test_only_a_battery_in_use_counts(battery: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert on_battery() is expected
    monkeypatch.delattr(psutil, "sensors_battery")
    assert on_battery() is False


@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_only_a_metal_gpu_is_kept_warm(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_keep_warm(setting) is None
    # A Mac that computes on its CPU.
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert make_keep_warm(setting) is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    warm = make_keep_warm(setting)
    assert (warm is not None) == (setting != "off")
    if warm is not None:
        monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=False), raising=False)
        assert warm.is_on() == (setting == "on")
    # An NVIDIA GPU.
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert make_keep_warm(setting) is None


def test_an_error_of_the_device_ends_it_with_one_warning(file: Path, slow_disk: None) -> None:
    class Broken(KeepWarm):
        launches = 0

        def _launch(self) -> None:
            self.launches += 1
            raise RuntimeError("no stream")

    warm = Broken(mx.Device(mx.cpu))
    with pytest.warns(UserWarning, match="the GPU is not kept warm while it waits for the disk: no stream") as found:
        for _ in range(2):
            read(file, warm)
    assert (warm.launches, len(found)) == (1, 1)


def test_every_thread_launches_on_a_stream_of_its_own() -> None:
    warm = Recorded()
    errors: list[str] = []

    def launch() -> None:
        warm.launch()
        warm.launch()
        errors.extend(["failed"] if warm._failed else [])

    launch()
    for _ in range(2):
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    assert (errors, len(warm.times)) == ([], 6)


def test_output_is_the_same(
    checkpoint: WriteFamily, expected: Expected, slow_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = Recorded()
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 16)
    settings: list[str] = []
    monkeypatch.setattr(swap, "make_keep_warm", lambda setting: settings.append(setting) or warm)
    folder = checkpoint("qwen3_5_moe")
    wanted = expected(folder)
    # As fast as a disk, or the test takes a minute.
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 20))
    assert_same(run(streamed(folder, config=Config(keep_warm="on")), PROMPT), wanted)
    assert settings[-1] == "on"
    assert len(warm.times) > 100
