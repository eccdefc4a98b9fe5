"""Checkpoints in the layouts of Hugging Face uploads, made from what mlx-lm would save after converting them."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

Rewrite = Callable[[str, mx.array], Iterable[tuple[str, mx.array]]]


def read(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a checkpoint by its name on disk."""
    return {name: array for file in sorted(folder.glob("model*.safetensors")) for name, array in mx.load(file).items()}


def write(folder: Path, tensors: dict[str, mx.array], config: dict[str, Any], tokenizer: Path) -> Path:
    """Write a checkpoint of one file, with another's tokenizer."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def rewrite(source: Path, folder: Path, change: Rewrite, **config: Any) -> Path:
    """Write a checkpoint of which ``change`` makes other tensors of each one.

    Args:
        source (Path): the checkpoint to start from.
        folder (Path): where to; must not exist.
        change (Callable): a name and an array -> names and arrays.
        config: what differs in config.json; ``None`` removes an entry.
    """
    tensors = dict(pair for name, array in read(source).items() for pair in change(name, array))
    entries = json.loads((source / "config.json").read_text()) | config
    return write(folder, tensors, {key: value for key, value in entries.items() if value is not None}, source)


def one_tensor_per_expert(pattern: str, template: str, names: dict[str, str]) -> Rewrite:
    r"""Unstack experts.

    Args:
        pattern (str): a regular expression with the groups ``parent``, ``projection`` and ``kind``.
        template (str): the name on disk with ``{parent}``, ``{expert}``, ``{projection}`` and ``{kind}``.
        names (dict[str, str]): what each projection is called on disk.
    """

    def change(name: str, array: mx.array) -> Iterable[tuple[str, mx.array]]:
        match = re.fullmatch(pattern, name)
        if match is None:
            return [(name, array)]
        groups = match.groupdict() | {"projection": names[match["projection"]]}
        return [(template.format(expert=expert, **groups), array[expert]) for expert in range(array.shape[0])]

    return change
