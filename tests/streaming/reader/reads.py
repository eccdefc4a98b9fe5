"""A file's bytes, and reads of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flashmoe_mlx.checkpoint.span import Span

# Bytes that several threads share.
LARGE = 1 << 18
DATA = np.random.default_rng(0).bytes(8 * LARGE)

Preadv = Callable[..., int]


def plan(file: Path, sizes: Sequence[int]) -> list[tuple[Span, memoryview]]:
    """Return spans of these sizes at odd offsets, each with a buffer."""
    return [
        (Span(str(file), 13 * number, size), memoryview(bytearray(b"\xaa" * size)))
        for number, size in enumerate(sizes, 1)
    ]


def complete(reads: Sequence[tuple[Span, memoryview]]) -> bool:
    return all(buffer == DATA[span.offset : span.offset + span.nbytes] for span, buffer in reads)


SIZES = [1, LARGE, 4096, LARGE + 7, 0, 3 * LARGE, LARGE - 1, 2 * LARGE, 5]
