"""Log probabilities that a model gives a text while decoding, and a file that keeps them."""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from safetensors import SafetensorError, safe_open

from flashmoe_mlx.system.atomic_write import replacing

_TENSOR = "logprobs"


def logprobs(model: nn.Module, tokens: Sequence[int], context: int) -> Iterator[mx.array]:
    """Predict each token of a text from those before it, one decode step per token.

    Decode steps are what generation does. A prefill would be faster, but it uses other kernels and reads the experts
    in waves.

    Args:
        model (nn.Module): From ``load`` or mlx-lm.
        tokens (Sequence[int]): The text.
        context (int): Tokens after which the model starts with an empty cache again, which bounds its memory.

    Yields:
        mx.array: float32 ``[vocabulary]`` log probabilities of each token but the first, not evaluated.
    """
    inputs = tokens[:-1]
    for start in range(0, len(inputs), context):
        cache = make_prompt_cache(model)
        for token in inputs[start : start + context]:
            logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
            yield logits - mx.logsumexp(logits)


class LogprobsFile:
    """Log probabilities on disk: one float32 ``[positions, vocabulary]`` tensor in a safetensors file.

    That is 2 GB for 2,000 positions of a vocabulary of 248,000. Nothing is rounded, so the divergence of a model from
    its own file is 0. A row is read when it is indexed.

    Args:
        path (Path): A file that :meth:`write` wrote.
        identity (dict[str, str]): The model, text and settings that it must be of.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or of something else.
    """

    def __init__(self, path: Path, identity: dict[str, str]):
        try:
            file: Any = safe_open(path, framework="numpy")
            found = file.metadata() or {}
            if _TENSOR not in file.keys():  # noqa: SIM118 - not a dict
                raise ValueError(f"{path} holds no log probabilities: give another file")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a reference: {error}. Delete it to compute it again") from error
        changed = sorted(name for name in identity if found.get(name) != identity[name])
        if changed:
            raise ValueError(f"{path} is of another {', '.join(changed)}: delete it to compute it again")
        self._rows = file.get_slice(_TENSOR)

    @classmethod
    def write(cls, path: Path, identity: dict[str, str], rows: Iterator[mx.array], positions: int) -> Self:
        """Compute and keep log probabilities. If interrupted, no file is left.

        Args:
            path (Path): The file.
            identity (dict[str, str]): The model, text and settings that they are of.
            rows (Iterator[mx.array]): float32 ``[vocabulary]``, as many as ``positions``.
            positions (int): At least 1.

        Raises:
            OSError: The file cannot be written.
        """
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            first = next(rows)
            file.write(_header(positions, first.size, identity))
            file.write(np.asarray(first).data)
            for row in rows:
                file.write(np.asarray(row).data)
        return cls(path, identity)

    def __getitem__(self, position: int) -> mx.array:
        """Return the float32 ``[vocabulary]`` log probabilities of one position."""
        return mx.array(self._rows[position])


def _header(positions: int, vocabulary: int, metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file of one tensor. The safetensors package could not write row by row."""
    tensor = {"dtype": "F32", "shape": [positions, vocabulary], "data_offsets": [0, 4 * positions * vocabulary]}
    header: dict[str, Any] = {"__metadata__": metadata, _TENSOR: tensor}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
