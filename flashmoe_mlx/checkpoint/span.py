"""Places in files: a span of bytes, and a tensor with its dtype and shape."""

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
"""safetensors' dtypes that MLX holds in memory as they are on disk."""


class Span(NamedTuple):
    """``nbytes`` bytes of the file ``path`` from ``offset`` on."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its safetensors ``dtype``, its ``shape`` and the ``span`` that holds it."""

    dtype: str
    shape: tuple[int, ...]
    span: Span

    @property
    def file(self) -> str:
        """The name of its file in the checkpoint's folder."""
        return Path(self.span.path).name

    def block(self, number: int, count: int) -> Span:
        """The span of one of ``count`` equal blocks that the tensor is cut into along its bytes."""
        path, offset, nbytes = self.span
        return Span(path, offset + number * (nbytes // count), nbytes // count)
