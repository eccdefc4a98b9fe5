"""Rows that files are read into, and half precision that becomes float32 without rounding."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.streaming.slab import Slab

BITS = np.arange(1 << 16, dtype=np.uint16)
"""Every number in half precision."""


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float16], ids=str)
def test_widening_is_exact(stored: mx.Dtype) -> None:
    rows = Slab(3, (256, 256), stored, mx.float32)
    rows.buffer(1)[:] = BITS.tobytes()
    rows.widen(1)
    actual = np.asarray(rows.array[1]).ravel()
    expected = np.asarray(mx.array(BITS).view(stored).astype(mx.float32))
    numbers = ~np.isnan(expected)
    assert numbers.sum() > 60000
    # As integers, so that -0.0 counts.
    assert np.array_equal(actual.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(actual[~numbers]).all()
    # Other rows stay as they were.
    assert not mx.any(rows.array[0]).item()
    assert not mx.any(rows.array[2]).item()


@pytest.mark.parametrize("stored", [mx.uint8, mx.uint32, mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_bytes_stay_as_stored_if_nothing_is_widened(stored: mx.Dtype) -> None:
    shape = (3, 8)
    rows = Slab(2, shape, stored, stored)
    data = np.arange(24 * stored.size, dtype=np.uint8)
    rows.buffer(1)[:] = data.tobytes()
    rows.widen(1)
    assert rows.array.dtype == stored
    assert rows.stored_nbytes == rows.array[0].nbytes == data.nbytes
    assert np.array_equal(np.asarray(rows.array[1].view(mx.uint8)).ravel(), data)
    assert not mx.any(rows.array[0]).item()


def test_rows_may_be_scalars() -> None:
    """In nvfp4 an expert may have a single scale."""
    rows = Slab(4, (), mx.float32, mx.float32)
    rows.buffer(2)[:] = np.float32(1.5).tobytes()
    rows.widen(2)
    assert rows.array.tolist() == [0, 0, 1.5, 0]


def test_graphs_see_rows_written_after_they_were_built() -> None:
    """Because nothing is copied."""
    rows = Slab(2, (4,), mx.float32, mx.float32)
    doubled = rows.array * 2
    rows.buffer(0)[:] = np.full(4, 3, np.float32).tobytes()
    assert doubled[0].tolist() == [6, 6, 6, 6]


def write_beside_a_running_kernel(steps: int) -> None:
    """Write rows that share a cache line with one that the device reads meanwhile, and let the device read them."""
    rows = Slab(64, (2,), mx.float32, mx.float32)
    for row in range(0, 64, 2):
        rows.buffer(row)[:] = np.full(2, row, np.float32).tobytes()
        busy = rows.array[row]
        for _ in range(steps):
            busy = busy * 0.5 + rows.array[row]
        mx.async_eval(busy)
        rows.buffer(row + 1)[:] = np.full(2, row + 1, np.float32).tobytes()
        assert (rows.array[row + 1] + 0).tolist() == [row + 1, row + 1]
        assert np.allclose(np.asarray(busy), 2 * row)


def test_a_row_may_be_written_while_its_neighbor_is_read() -> None:
    write_beside_a_running_kernel(50)


@pytest.mark.metal
def test_a_row_may_be_written_while_a_gpu_reads_its_neighbor(on_gpu: Backend) -> None:
    if on_gpu is not Backend.METAL:
        pytest.skip("an NVIDIA GPU gets its rows by copies")
    write_beside_a_running_kernel(500)
