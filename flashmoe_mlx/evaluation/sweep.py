"""Evaluation of a model in every combination of bits, experts per token and memory budgets."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from flashmoe_mlx.evaluation.measure import Row, Setting, measure, open_reference
from flashmoe_mlx.evaluation.tasks import Task
from flashmoe_mlx.evaluation.text import Text
from flashmoe_mlx.model.requantize import expert_bits, requantize


def combine(
    name: str,
    folder: Path,
    bits: Sequence[int] | None,
    experts_per_token: Sequence[int],
    ram_budgets: Sequence[int | str],
    copies: Path,
) -> list[Setting]:
    """Return all combinations, and write the copies with other bits that are missing.

    Args:
        name (str): Name of the model in the table.
        folder (Path): Its checkpoint.
        bits (Sequence[int], optional): Bits of the experts. ``None`` for the checkpoint's own.
        experts_per_token (Sequence[int]): Routed experts per token.
        ram_budgets (Sequence[int or str]): Memory for cached experts, as for ``load``.
        copies (Path): Folder of the copies.

    Raises:
        ValueError: MLX cannot quantize to that many bits.
        OSError: A copy cannot be written.
    """
    own = expert_bits(folder)
    folders = {own: folder} if bits is None else {}
    for each in bits or []:
        folders[each] = folder if each == own else requantize(folder, each, copies)
    grid = product(folders.items(), experts_per_token, ram_budgets)
    return [Setting(name, copy, each, top_k, budget) for (each, copy), top_k, budget in grid]


def sweep(
    settings: Sequence[Setting],
    reference: Path,
    text: Text | None,
    logprobs: Path | None,
    tasks: Sequence[Task],
    max_tokens: int,
) -> Iterator[Row]:
    """Measure one setting after the other.

    Args:
        settings (Sequence[Setting]): From :func:`combine`.
        reference (Path): Checkpoint to compare with.
        text (Text, optional): Text to predict.
        logprobs (Path, optional): File that keeps the reference's log probabilities. ``None`` for a temporary file.
        tasks (Sequence[Task]): Tasks to answer. May be empty.
        max_tokens (int): Longest answer, in tokens.

    Yields:
        Row: The measurements of each setting.

    Raises:
        ValueError: A setting is impossible, or the file is of another model, text or setting.
        OSError: A file cannot be read or written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = logprobs or Path(temporary) / "reference.safetensors"
        expected = None if text is None else open_reference(reference, text, path)
        for setting in settings:
            yield measure(setting, text, expected, tasks, max_tokens)
