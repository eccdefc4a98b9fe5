"""Pinned read-back returns what the router chose, and a write that is lost costs nothing but time."""

import warnings

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.layers import readback
from flashmoe_mlx.layers.readback import PinnedReadback, checked_readback
from flashmoe_mlx.model import swap
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers
from tests.conftest import WriteFamily
from tests.support.oracle import assert_same, resident, run, streamed
from tests.support.pinned import HostBuffers


class HostReadback(PinnedReadback):
    """A read-back without a GPU: the host writes what the kernel would, unless writes are to be lost."""

    arrives = True
    polled: list[list[int] | None]

    def __init__(self) -> None:
        super().__init__()
        self.polled = []

    def poll(self) -> list[int] | None:
        self.polled.append(super().poll())
        return self.polled[-1]

    def _allocate(self) -> PinnedBuffers:
        return HostBuffers(8 * 1024, 1)

    def _write(self, numbers: mx.array, sequence: mx.array) -> mx.array:
        if self.arrives:
            for i, number in enumerate(np.asarray(numbers).ravel().tolist()):
                self._words[i] = sequence.item() << 32 | number
        return sequence


def test_poll_returns_what_was_written() -> None:
    pinned = HostReadback()
    for numbers in ([[7, 0, 511]], [[2**32 - 1]], [list(range(40))]):
        pinned.write(mx.array(numbers, mx.uint32))
        assert pinned.poll() == numbers[0]
    assert pinned.write(mx.zeros((1025,), mx.uint32)) is None


def test_a_stale_value_is_never_taken_for_a_new_one() -> None:
    pinned = HostReadback()
    pinned.write(mx.array([1, 2, 3, 4]))
    pinned.write(mx.array([5, 6]))
    pinned.arrives = False
    pinned.write(mx.array([7, 8, 9]))
    assert pinned.poll() is None
    # One of three words has arrived.
    pinned._words[0] = pinned._sequence << 32 | 7
    assert pinned.poll() is None


def test_a_read_back_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "PinnedReadback", HostReadback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(checked_readback(), HostReadback)


def test_a_read_back_whose_kernel_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raising(HostReadback):
        def _write(self, numbers: mx.array, sequence: mx.array) -> mx.array:
            raise RuntimeError("Failed to compile kernel:\n" + "nvrtc says a lot\n" * 100)

    class Losing(HostReadback):
        arrives = False

    for kind, words in ((Raising, "raised RuntimeError: Failed to compile kernel: nvrtc"), (Losing, "returned None")):
        monkeypatch.setattr(readback, "PinnedReadback", kind)
        with pytest.warns(UserWarning, match="router indices are read back through MLX") as caught:
            assert checked_readback() is None
        (warning,) = caught
        assert words in str(warning.message)
        assert len(str(warning.message)) < 500


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_read_back_does_not_change_the_output(
    family: str, arrives: bool, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[HostReadback] = []
    sync = swap.RouterSync

    def with_readback(counters: object, _: object) -> object:
        pinned.append(HostReadback())
        return sync(counters, pinned[-1])

    folder = checkpoint(family)
    wanted = run(resident(folder))
    monkeypatch.setattr(swap, "RouterSync", with_readback)
    monkeypatch.setattr(HostReadback, "arrives", arrives)
    monkeypatch.setattr(readback, "_POLL_TIMEOUT", 1e-5)
    assert_same(run(streamed(folder, 0.25)), wanted)
    assert pinned[-1].polled
    assert all((numbers is not None) == arrives for numbers in pinned[-1].polled)
