"""LoRA adapters of the trunk. Experts cannot have any, because they are read from the checkpoint as they are."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.nn as nn
import mlx_lm.utils

from flashmoe_mlx.checkpoint.folder import damaged_json
from flashmoe_mlx.checkpoint.header import read_header
from flashmoe_mlx.system.text import brief


def check_adapters(folder: Path, switches: Iterable[str]) -> None:
    """Check the files of adapters, and refuse adapters of experts. No tensor is read.

    Args:
        folder (Path): The folder that mlx-lm wrote.
        switches (Iterable[str]): Paths of the switch layers in the model.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged or not of mlx-lm, or an expert has an adapter.
    """
    file, weights = folder / "adapter_config.json", folder / "adapters.safetensors"
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of adapters: {folder}")
    if damaged := damaged_json(file):
        raise ValueError(damaged)
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    if "peft_type" in config:
        raise ValueError(f"{file} is of PEFT, and mlx-lm reads only adapters that mlx_lm.lora wrote: train with that")
    for each in (file, weights):
        if not each.is_file():
            raise FileNotFoundError(f"{folder} has no {each.name}: give a folder that mlx_lm.lora wrote")
    names = [entry.name for entry in read_header(weights)[1]]
    parameters = config.get("lora_parameters")
    keys = parameters.get("keys") if isinstance(parameters, dict) else None
    wanted = sorted(set(_of_experts([*names, *(keys if isinstance(keys, list) else [])], switches)))
    if wanted:
        raise ValueError(
            f"experts cannot have adapters here, because they stay on disk as they are, and {folder} has some: leave "
            f"{', '.join(wanted)} out of the keys of its lora_parameters and train again, or make one checkpoint of "
            f"both with mlx_lm.fuse --adapter-path {folder}"
        )


def load_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """Apply adapters as mlx-lm does.

    Args:
        model (nn.Module): The model.
        folder (Path): Adapters that :func:`check_adapters` has accepted.

    Raises:
        ValueError: They are of another model, or their config is incomplete.
    """
    try:
        return mlx_lm.utils.load_adapters(model, str(folder))
    except Exception as error:
        raise ValueError(
            f"mlx-lm cannot apply the adapters of {folder} ({brief(error)}): are they of this model, and complete?"
        ) from error


def _of_experts(names: Iterable[object], switches: Iterable[str]) -> Iterator[str]:
    """Yield the keys, as mlx-lm takes them, of those names that lie in a switch layer.

    A key is a path in the model, or in a layer.
    """
    paths = {path: re.sub(r"^.*\blayers\.\d+\.", "", path) for path in switches}
    for name in names:
        for path, key in paths.items():
            for beginning in (path, key):
                if isinstance(name, str) and name.startswith(f"{beginning}."):
                    yield f"{key}.{name.removeprefix(f'{beginning}.').split('.')[0]}"
