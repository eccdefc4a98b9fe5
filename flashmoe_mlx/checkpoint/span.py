"""Ranges of bytes in files, and the tensors in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
"""The safetensors dtypes whose bytes on disk are those of an MLX array."""


class Span(NamedTuple):
    """A range of bytes in a file.

    Args:
        path (str): The file.
        offset (int): First byte.
        nbytes (int): Number of bytes.
    """

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Args:
        dtype (str): The dtype, by its name in safetensors.
        shape (tuple[int, ...]): The shape.
        span (Span): The bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    span: Span

    @property
    def file(self) -> str:
        """Return the name of its file, without the folder."""
        return Path(self.span.path).name

    def block(self, number: int, count: int) -> Span:
        """Return one of ``count`` blocks of equal size, in the order of the bytes."""
        path, offset, nbytes = self.span
        return Span(path, offset + number * (nbytes // count), nbytes // count)
