"""Checkpoints in the layouts of Hugging Face uploads, made from what mlx-lm would save after converting them."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

Rewrite = Callable[[str, mx.array], Iterable[tuple[str, mx.array]]]


def read(folder: Path) -> dict[str, mx.array]:
    """Return every tensor of a checkpoint by its name on disk."""
    return {name: array for file in sorted(folder.glob("model*.safetensors")) for name, array in mx.load(file).items()}


def write(folder: Path, tensors: dict[str, mx.array], config: dict[str, Any], tokenizer: Path) -> Path:
    """Write a checkpoint of one file, with the tokenizer of another."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def rewrite(source: Path, folder: Path, change: Rewrite, **config: Any) -> Path:
    """Write a copy of a checkpoint with other tensors.

    Args:
        source (Path): The checkpoint to start from.
        folder (Path): The copy, which must not exist.
        change (Callable): Takes a name and an array, and returns names and arrays in their place.
        config: Entries of config.json to replace; ``None`` removes an entry.
    """
    tensors = dict(pair for name, array in read(source).items() for pair in change(name, array))
    entries = json.loads((source / "config.json").read_text()) | config
    return write(folder, tensors, {key: value for key, value in entries.items() if value is not None}, source)


def one_tensor_per_expert(pattern: str, template: str, names: dict[str, str]) -> Rewrite:
    r"""Return a change that unstacks experts.

    Args:
        pattern (str): A regular expression with the groups ``parent``, ``projection`` and ``kind``.
        template (str): The name on disk with ``{parent}``, ``{expert}``, ``{projection}`` and ``{kind}``.
        names (dict[str, str]): The name of each projection on disk.
    """

    def change(name: str, array: mx.array) -> Iterable[tuple[str, mx.array]]:
        match = re.fullmatch(pattern, name)
        if match is None:
            return [(name, array)]
        groups = match.groupdict() | {"projection": names[match["projection"]]}
        return [(template.format(expert=expert, **groups), array[expert]) for expert in range(array.shape[0])]

    return change
