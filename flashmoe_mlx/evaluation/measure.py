"""One line of the quality table: a model in one setting, against a reference."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from tqdm import tqdm

from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.evaluation.logprobs import LogprobsFile, logprobs
from flashmoe_mlx.evaluation.metrics import Quality, compare
from flashmoe_mlx.evaluation.tasks import Marks, Task, answer
from flashmoe_mlx.model.load import load


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Args:
        model (str): its name, for people.
        folder (Path): the checkpoint, or a copy with other bits.
        bits (int, optional): of its experts; ``None`` for mixed or not quantized.
        experts_per_token (int): routed experts a token uses; 0 for a checkpoint that does not say how many.
        ram_budget (int or str): memory for experts, as for ``load``.
    """

    model: str
    folder: Path
    bits: int | None
    experts_per_token: int
    ram_budget: int | str

    def __str__(self) -> str:
        return f"{self.bits or 'own'} bits, {self.experts_per_token} experts a token, budget {self.ram_budget}"


class Text(NamedTuple):
    """What the models read.

    Args:
        tokens (Sequence[int]): at least two.
        context (int): after so many the models forget and start anew.
    """

    tokens: Sequence[int]
    context: int

    @property
    def positions(self) -> int:
        """Tokens to predict: all but the first."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Row:
    """What was measured in a setting.

    Args:
        setting (Setting): the setting.
        quality (Quality, optional): on the text, if there was one.
        marks (Marks, optional): on the tasks, if there were any.
    """

    setting: Setting
    quality: Quality | None
    marks: Marks | None

    def columns(self) -> dict[str, Any]:
        """Everything by name, for a line of CSV; an estimate takes three columns, what was not measured is empty."""
        columns = {name: value for name, value in asdict(self.setting).items() if name != "folder"}
        for kind, measured in ((Quality, self.quality), (Marks, self.marks)):
            for name, annotation in kind.__annotations__.items():
                figure = getattr(measured, name, None)
                if "Estimate" not in str(annotation):
                    columns[name] = figure
                    continue
                ends = (name, f"{name}_low", f"{name}_high")
                columns |= dict(zip(ends, figure or (None,) * 3, strict=True))
        return columns


def open_reference(folder: Path, text: Text, path: Path) -> LogprobsFile:
    """The log probabilities of a model at its native setting; computed if the file is not there yet.

    Args:
        folder (Path): the model's checkpoint.
        text (Text): what it reads.
        path (Path): where they are, or are to be kept.

    Raises:
        ValueError: the file is of another model, text, or setting.
        OSError: it cannot be written.
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
    rows = _watched(logprobs(model, *text), text.positions, "reference")
    return LogprobsFile.write(path, identity, rows, text.positions)


def measure(
    setting: Setting, text: Text | None, reference: LogprobsFile | None, tasks: Sequence[Task], max_tokens: int
) -> Row:
    """Run a model in a setting.

    Args:
        setting (Setting): the setting.
        text (Text, optional): what to read.
        reference (LogprobsFile, optional): of the same text; there is one if there is a text.
        tasks (Sequence[Task]): what to ask; may be empty.
        max_tokens (int): of an answer.

    Raises:
        ValueError: the setting is impossible, or the reference's vocabulary is another.
    """
    gc.collect()  # the model before this one has parts that refer to each other
    mx.clear_cache()
    model, tokenizer = load(
        str(setting.folder), ram_budget=setting.ram_budget, experts_per_token=setting.experts_per_token or None
    )[:2]
    quality = marks = None
    if text is not None and reference is not None:
        rows = _watched(logprobs(model, *text), text.positions, str(setting))
        quality = Quality.of([compare(row, reference[i], text.tokens[i + 1]) for i, row in enumerate(rows)])
    if tasks:
        watched = tqdm(tasks, desc=f"tasks, {setting}", leave=False, disable=None)
        marks = Marks.of(tasks, [answer(model, tokenizer, task, max_tokens) for task in watched], tokenizer)
    return Row(setting, quality, marks)


def _watched(rows: Iterator[mx.array], positions: int, name: str) -> Iterator[mx.array]:
    return iter(tqdm(rows, desc=name, total=positions, unit="tok", leave=False, disable=None))
