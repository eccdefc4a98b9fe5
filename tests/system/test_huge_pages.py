"""Huge pages change where an array lies, and nothing else."""

import platform
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe_mlx.system.huge_pages import use_huge_pages


def test_values_stay_the_same() -> None:
    wide = mx.random.normal((2048, 4096), key=mx.random.key(0))
    for array in (
        wide,
        wide.astype(mx.bfloat16),
        wide.T,
        wide[:, ::2],
        mx.broadcast_to(wide[:1], wide.shape),
        mx.array(1.0),
        mx.zeros((0,)),
    ):
        before = mx.array(array)
        mx.eval(array, before)
        use_huge_pages(array)
        assert mx.array_equal(array, before)


def test_memory_lies_in_huge_pages() -> None:
    """At least half of 64 MB, where the machine grants them at once."""
    granted = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or not granted.exists() or "[never]" in granted.read_text() or _linux() < (6, 1):
        pytest.skip("no huge pages here")

    def huge() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))

    # Otherwise the array may get memory that has been counted.
    mx.clear_cache()
    before = huge()
    array = mx.ones((64 << 20,), mx.uint8)
    mx.eval(array)
    use_huge_pages(array)
    if mx.default_device().type == mx.cpu:
        assert huge() - before > 32 << 20


def _linux() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])
