"""Read-back returns what the router chose, and a write that is lost costs nothing but time."""

import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.layers import readback as readback_module
from flashmoe_mlx.layers.readback import Readback, make_readback, pinned_readback
from flashmoe_mlx.model import swap
from flashmoe_mlx.ops.dispatch import Backend
from tests.conftest import WriteFamily
from tests.support.emulator import Emulated
from tests.support.oracle import assert_same, resident, run, streamed
from tests.support.pinned import HostBuffers


class HostReadback(Readback):
    """A read-back without a GPU: the host writes what the kernel would, unless writes are to be lost."""

    arrives = True
    polled: list[list[int] | None]

    def __init__(self, words: memoryview | None = None) -> None:
        super().__init__(memoryview(bytearray(8 * 1024)).cast("Q") if words is None else words, self.write_words)
        self.polled = []

    def poll(self, timeout: float | None = None) -> list[int] | None:
        self.polled.append(super().poll(timeout))
        return self.polled[-1]

    def write_words(self, numbers: mx.array, sequence: mx.array) -> mx.array:
        if self.arrives:
            for i, number in enumerate(np.asarray(numbers).ravel().tolist()):
                self._words[i] = sequence.item() << 32 | number
        return sequence


def write_on_host(kernel: Any, numbers: mx.array, sequence: mx.array, memory: mx.array) -> mx.array:
    """Do what the Metal kernel does to the memory of an array."""
    words = np.asarray(memoryview(memory))
    for i, number in enumerate(np.asarray(numbers).ravel().tolist()):
        words[2 * i], words[2 * i + 1] = number, sequence.item()
    return sequence


def test_poll_returns_what_was_written() -> None:
    readback = HostReadback()
    for numbers in ([[7, 0, 511]], [[2**32 - 1]], [list(range(40))]):
        readback.write(mx.array(numbers, mx.uint32))
        assert readback.poll() == numbers[0]
    assert readback.write(mx.zeros((1025,), mx.uint32)) is None


def test_a_stale_value_is_never_taken_for_a_new_one() -> None:
    readback = HostReadback()
    readback.write(mx.array([1, 2, 3, 4]))
    readback.write(mx.array([5, 6]))
    readback.arrives = False
    readback.write(mx.array([7, 8, 9]))
    assert readback.poll() is None
    # One of three words has arrived.
    readback._words[0] = readback._sequence << 32 | 7
    assert readback.poll() is None


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_read_back_does_not_change_the_output(
    family: str, arrives: bool, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HostReadback] = []

    def make(_: Backend) -> HostReadback:
        made.append(HostReadback())
        return made[-1]

    folder = checkpoint(family)
    wanted = run(resident(folder))
    monkeypatch.setattr(swap, "make_readback", make)
    monkeypatch.setattr(HostReadback, "arrives", arrives)
    monkeypatch.setattr(readback_module, "_POLL_TIMEOUT", 1e-5)
    assert_same(run(streamed(folder, 0.25)), wanted)
    assert made[-1].polled
    assert all((numbers is not None) == arrives for numbers in made[-1].polled)


def test_metal_and_host_share_the_memory_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback_module, "_write", write_on_host)
    readback = make_readback(Backend.METAL)
    assert readback is not None
    for numbers in ([[7, 0, 511]], [[2**32 - 1]], [list(range(1024))]):
        readback.write(mx.array(numbers, mx.uint32))
        assert readback.poll() == numbers[0]


def test_cuda_writes_to_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    monkeypatch.setattr(readback_module, "PinnedBuffers", HostBuffers)
    monkeypatch.setattr(readback_module, "_write", lambda kernel, n, s, at: addresses.append(at.item()) or s)
    monkeypatch.setattr(readback_module, "_cuda_kernel", lambda: None)
    readback = pinned_readback()
    readback.write(mx.array([1, 2]))
    assert addresses == [np.asarray(readback._words).ctypes.data]


@pytest.mark.parametrize("backend", [Backend.NATIVE, Backend.REFERENCE])
def test_other_backends_have_none(backend: Backend) -> None:
    assert make_readback(backend) is None


def refused(*_: Any) -> mx.array:
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: Metal 3.2")


def lost(kernel: Any, numbers: mx.array, sequence: mx.array, memory: mx.array) -> mx.array:
    return sequence


def mixed_up(kernel: Any, numbers: mx.array, sequence: mx.array, memory: mx.array) -> mx.array:
    return write_on_host(kernel, mx.zeros_like(numbers), sequence, memory)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (refused, r"Unable to build metal library from source$"),
        (lost, "nothing arrives$"),
        (mixed_up, r"\[3, 0, 4294967295\] arrive as \[0, 0, 0\]$"),
    ],
)
def test_a_kernel_that_does_not_work_is_not_used(write: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried when a model is loaded."""
    monkeypatch.setattr(readback_module, "_write", write)
    monkeypatch.setattr(readback_module, "_FIRST_TIMEOUT", 0.01)
    with pytest.warns(UserWarning, match="read back with MLX's events, which is slower: .*" + reason) as found:
        assert make_readback(Backend.METAL) is None
    assert len(found) == 1


def test_the_metal_kernel_writes_each_number_and_its_sequence_number() -> None:
    """In the emulator, where a kernel must not write to its inputs: the words are an output here."""
    kernel = mx.fast.metal_kernel(
        name="readback",
        input_names=["numbers", "sequence"],
        output_names=["words"],
        header=readback_module._METAL_HEADER,
        source="""
        const uint i = thread_position_in_grid.x;
        write_word(uint(numbers[i]), sequence[0], words, i);
        """,
    )
    for numbers in (mx.array([7, 0, 511]), mx.array([[2**32 - 1]], mx.uint32), mx.arange(1000, dtype=mx.int16)):
        (words,) = Emulated(kernel)(
            inputs=[numbers, mx.array([3_000_000_000], mx.uint32)],
            output_shapes=[(2 * numbers.size,)],
            output_dtypes=[mx.uint32],
            grid=(numbers.size, 1, 1),
            threadgroup=(numbers.size, 1, 1),
        )
        assert words[::2].tolist() == numbers.reshape(-1).tolist()
        assert words[1::2].tolist() == [3_000_000_000] * numbers.size


@pytest.mark.metal
def test_numbers_arrive_from_a_gpu_before_its_work_ends(on_gpu: Backend) -> None:
    readback = make_readback(on_gpu)
    if readback is None:
        pytest.skip("no read-back on this GPU")
    for count in (1, 10, 80, 1024):
        for dtype in (mx.uint32, mx.int32, mx.int64):
            numbers = (mx.arange(count) * 31 % 1009).astype(dtype)[None]
            written = readback.write(numbers)
            mx.async_eval(written)
            assert readback.poll(1) == numbers.reshape(-1).tolist()
    # Each write is seen, or missed within the time limit, and never a stale one.
    arrived = 0
    for step in range(2000):
        numbers = mx.arange(step, step + 10)
        mx.async_eval(readback.write(numbers))
        polled = readback.poll()
        assert polled in (None, list(range(step, step + 10)))
        arrived += polled is not None
        mx.synchronize()
    assert arrived > 1000


@pytest.mark.metal
def test_a_gpu_runs_on_after_its_numbers_have_arrived(on_gpu: Backend) -> None:
    readback = make_readback(on_gpu)
    if readback is None:
        pytest.skip("no read-back on this GPU")
    matrix = mx.random.normal((4096, 4096))
    mx.eval(matrix)
    for _ in range(3):
        written = readback.write(mx.array([1, 2, 3]) + 0)
        mx.async_eval(written)
        product = matrix
        for _ in range(50):
            product = product @ matrix * 1e-2
        mx.async_eval(product)
        begin = time.perf_counter()
        assert readback.poll(1) == [1, 2, 3]
        polled = time.perf_counter() - begin
        mx.eval(product)
        assert polled < time.perf_counter() - begin
