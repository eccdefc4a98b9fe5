"""Measurements of a model in one setting, against a reference."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.evaluation.logprobs import LogprobsFile, logprobs
from flashmoe_mlx.evaluation.metrics import Quality, compare
from flashmoe_mlx.evaluation.tasks import Task, TaskScores, answer
from flashmoe_mlx.evaluation.text import Text
from flashmoe_mlx.model.load import load


@dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Args:
        model (str): Name of the model in the table.
        folder (Path): The checkpoint, or a copy with other bits.
        bits (int, optional): Bits of its experts. ``None`` for mixed bits or experts that are not quantized.
        experts_per_token (int): Routed experts per token. 0 for a checkpoint that does not say how many.
        ram_budget (int or str): Memory for cached experts, as for ``load``.
    """

    model: str
    folder: Path
    bits: int | None
    experts_per_token: int
    ram_budget: int | str

    def __str__(self) -> str:
        return f"{self.bits or 'own'} bits, {self.experts_per_token} experts per token, budget {self.ram_budget}"


@dataclass(frozen=True)
class Row:
    """The measurements of one setting.

    Args:
        setting (Setting): The setting.
        quality (Quality, optional): On the text, if there was one.
        scores (TaskScores, optional): On the tasks, if there were any.
    """

    setting: Setting
    quality: Quality | None
    scores: TaskScores | None

    def columns(self) -> dict[str, Any]:
        """Return all figures by name, for a row of CSV.

        An estimate takes three columns, for its value and interval. What was not measured is ``None``.
        """
        columns = {name: value for name, value in asdict(self.setting).items() if name != "folder"}
        for kind, measured in ((Quality, self.quality), (TaskScores, self.scores)):
            for name, annotation in kind.__annotations__.items():
                figure = getattr(measured, name, None)
                if "Estimate" not in str(annotation):
                    columns[name] = figure
                    continue
                ends = (name, f"{name}_low", f"{name}_high")
                columns |= dict(zip(ends, figure or (None,) * 3, strict=True))
        return columns


def open_reference(folder: Path, text: Text, path: Path) -> LogprobsFile:
    """Return the log probabilities of a model with its own number of experts. Compute them if the file does not exist.

    Args:
        folder (Path): Checkpoint of the model.
        text (Text): The text to predict.
        path (Path): The file.

    Raises:
        ValueError: The file is of another model, text or setting.
        OSError: The file cannot be written.
    """
    identity = {
        "checkpoint": model_identity(folder),
        "text": hashlib.sha256(str(list(text.tokens)).encode()).hexdigest(),
        "context": str(text.context),
        "device": str(mx.default_device()),
        "version of mlx": version("mlx"),
        "version of mlx-lm": version("mlx-lm"),
    }
    if path.exists():
        return LogprobsFile(path, identity)
    model = load(str(folder))[0]
    rows = _with_progress(logprobs(model, text.tokens, text.context), text.positions, "reference")
    return LogprobsFile.write(path, identity, rows, text.positions)


def measure(
    setting: Setting, text: Text | None, reference: LogprobsFile | None, tasks: Sequence[Task], max_tokens: int
) -> Row:
    """Run a model in a setting.

    Args:
        setting (Setting): The setting.
        text (Text, optional): Text to predict.
        reference (LogprobsFile, optional): Log probabilities of the reference on that text. Given with a text.
        tasks (Sequence[Task]): Tasks to answer. May be empty.
        max_tokens (int): Longest answer, in tokens.

    Raises:
        ValueError: The setting is impossible.
    """
    # The previous model is part of reference cycles.
    gc.collect()
    mx.clear_cache()
    model, tokenizer = load(
        str(setting.folder), ram_budget=setting.ram_budget, experts_per_token=setting.experts_per_token or None
    )[:2]
    quality = scores = None
    if text is not None and reference is not None:
        rows = _with_progress(logprobs(model, text.tokens, text.context), text.positions, str(setting))
        quality = Quality.of([compare(row, reference[i], text.tokens[i + 1]) for i, row in enumerate(rows)])
    if tasks:
        shown = tqdm(tasks, desc=f"tasks, {setting}", leave=False, disable=None)
        scores = TaskScores.of(tasks, [answer(model, tokenizer, task, max_tokens) for task in shown], tokenizer)
    return Row(setting, quality, scores)


def _with_progress(rows: Iterator[mx.array], positions: int, name: str) -> Iterator[mx.array]:
    return iter(tqdm(rows, desc=name, total=positions, unit="tok", leave=False, disable=None))
