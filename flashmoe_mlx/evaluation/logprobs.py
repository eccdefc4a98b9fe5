"""What a model expects at every position of a text, as it decodes; and a file that keeps it."""

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
    """Show a model the text and ask at each position for the next token's probabilities.

    One token a step, so that what is measured is what generation does. A wide batch goes other ways: other kernels, and
    the experts in waves.

    Args:
        model (nn.Module): from ``load`` or mlx-lm.
        tokens (Sequence[int]): the text.
        context (int): after so many tokens the model forgets and starts anew, so that all positions together cost no
            more memory than one such window.

    Yields:
        mx.array: float32 ``[vocabulary]`` log probabilities, for every token but the first; not evaluated.
    """
    shown = tokens[:-1]
    for start in range(0, len(shown), context):
        cache = make_prompt_cache(model)
        for token in shown[start : start + context]:
            logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
            yield logits - mx.logsumexp(logits)


class LogprobsFile:
    """Log probabilities on disk, float32 ``[positions, vocabulary]`` in a safetensors file: 4 bytes each.

    That is 2 GB for 2,000 positions of a vocabulary of 248,000. Nothing is rounded, so a model's distance to its own
    file is 0. Rows are read when they are asked for.

    Args:
        path (Path): a file that :meth:`write` wrote.
        identity (dict[str, str]): what the log probabilities must be of.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of something else, or damaged.
    """

    def __init__(self, path: Path, identity: dict[str, str]):
        try:
            file: Any = safe_open(path, framework="numpy")
            found = file.metadata() or {}
            if _TENSOR not in file.keys():  # noqa: SIM118 - not a dict
                raise ValueError(f"{path} holds no log probabilities: give another file")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no reference: {error}. Remove it to make it again") from error
        changed = sorted(name for name in identity if found.get(name) != identity[name])
        if changed:
            raise ValueError(f"{path} is of another {', '.join(changed)}: remove it to make it again")
        self._rows = file.get_slice(_TENSOR)

    @classmethod
    def write(cls, path: Path, identity: dict[str, str], rows: Iterator[mx.array], positions: int) -> Self:
        """Compute and keep log probabilities; whatever interrupts it, ``path`` is whole or not there.

        Args:
            path (Path): the file.
            identity (dict[str, str]): what they are of.
            rows (Iterator[mx.array]): float32 ``[vocabulary]``, as many as ``positions``, of which there is at least 1.
            positions (int): how many.

        Raises:
            OSError: it cannot be written.
        """
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            first = next(rows)
            file.write(_header(positions, first.size, identity))
            file.write(np.asarray(first).data)
            for row in rows:
                file.write(np.asarray(row).data)
        return cls(path, identity)

    def __getitem__(self, position: int) -> mx.array:
        """The float32 ``[vocabulary]`` log probabilities of one position."""
        return mx.array(self._rows[position])


def _header(positions: int, vocabulary: int, metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file of one tensor; written by hand so that the rows can follow one by one."""
    tensor = {"dtype": "F32", "shape": [positions, vocabulary], "data_offsets": [0, 4 * positions * vocabulary]}
    header: dict[str, Any] = {"__metadata__": metadata, _TENSOR: tensor}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
