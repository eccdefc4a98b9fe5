"""A model folder -> its config and which span of which file holds which tensor. Trusts none of its files."""

import json
import os
import re
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx_lm.utils import _download, load_config

from flashmoe_mlx.checkpoint.header import read_header
from flashmoe_mlx.checkpoint.remote_code import refuse_code
from flashmoe_mlx.checkpoint.span import Span, Tensor

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A model folder in the layout of the Hugging Face hub: config.json and safetensors files.

    Args:
        folder (Path): holds ``model*.safetensors``, as mlx-lm reads them, and their index if there are several.
        trust_remote_code (bool): take a config that names code to run. Default: ``False``.

    Attributes:
        config (dict): config.json, with what generation_config.json adds.
        tensors (dict[str, Tensor]): every tensor by its name on disk.

    Raises:
        FileNotFoundError: config.json or the safetensors are missing, or a file that the index names.
        ValueError: config.json or a header is damaged, files and index disagree, a file lies outside the folder, or the
            config names code to run that is not trusted.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.folder = folder
        self.config = read_config(folder)
        if not trust_remote_code:
            refuse_code(folder / "config.json", self.config)
        shards = sorted(folder.glob("model*.safetensors"))
        for file in sorted({*shards, *filter(Path.is_symlink, folder.iterdir())}):
            refuse_outside(file)  # links besides shards, because mlx-lm and transformers read other files too
        if not shards:
            raise FileNotFoundError(f"no model*.safetensors in {folder}: there are no weights that mlx-lm can load")
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            first, entries = read_header(shard)
            for name, dtype, shape, begin, end in entries:
                if name in self.tensors:
                    both = f"{self.tensors[name].file} and {shard.name}"
                    raise ValueError(f"{folder}: {both} both hold {name}: remove the one that is not this checkpoint's")
                self.tensors[name] = Tensor(dtype, shape, Span(str(shard), first + begin, end - begin))
        _check_index(folder, self.tensors)
        # mlx-lm drops multi-token-prediction layers, whose numbers repeat those of the model's own layers.
        self._by_tail = {tail(name): name for name in self.tensors if "mtp" not in name.split(".")}

    @property
    def files(self) -> list[str]:
        """The paths of its safetensors files."""
        return sorted({tensor.span.path for tensor in self.tensors.values()})

    def find(self, name: str) -> str | None:
        """The name on disk of a tensor that mlx-lm calls ``name``, or ``None``.

        Wrapping a model in another changes what stands before ``layers.<number>``; what follows tells it apart.
        """
        return name if name in self.tensors else self._by_tail.get(tail(name))


def tail(name: str) -> str:
    """A name from its layer number on, or the whole name.

    >>> tail("language_model.model.layers.3.mlp.gate.weight")
    'layers.3.mlp.gate.weight'
    """
    match = re.search(r"(?:^|\.)(layers\.\d+\..*)$", name)
    return match[1] if match else name


def find_folder(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a model; a hub repository is downloaded unless it is in the cache.

    Raises:
        FileNotFoundError: a path that does not exist.
        OSError: the hub cannot be reached, or has no such repository.
    """
    name = str(path_or_hf_repo)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: give the folder that holds config.json and the safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"no such folder: {path}")
    try:
        return Path(_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"there is no folder {name}, and the Hugging Face hub did not give it either ({reason}). "
            "Check the name and the network"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with what generation_config.json adds.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, or not a model's.
    """
    file = folder / "config.json"
    try:
        refuse_outside(file)
        config: dict[str, Any] = load_config(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no config.json in {folder}: not a model folder") from error
    except (UnicodeDecodeError, JSONDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}. Download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} names no model_type: not a model's config")
    return config


def refuse_outside(file: Path) -> None:
    """A model's files lie in its folder: a link out of it could name any file of the machine.

    The hub's cache may link ``snapshots/<commit>/<name>`` to ``blobs/<hash>`` of the same repository.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a file, or lies elsewhere.
    """
    folder = file.parent.resolve()
    homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        real = file.resolve(strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} is a link to itself. Download it again") from error
    except FileNotFoundError as error:
        if not file.is_symlink():
            raise
        raise ValueError(f"{file} is a link to nothing. Download it again") from error
    if real.parent not in homes:
        raise ValueError(f"{file} is a link out of the model's folder, to {real}: put the file itself there")
    if not real.is_file():
        raise ValueError(f"{file} is not a file. Download it again")


_PLAIN = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")  # a file's name without a path


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Files and index must tell the same story: a stale or missing shard would load as noise."""
    index = folder / INDEX
    if not os.path.lexists(index):
        return
    refuse_outside(index)
    try:
        places: dict[str, str] = dict(json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"])
        odd = [shard for shard in places.values() if not _PLAIN.fullmatch(shard)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}. Download it again") from error
    if odd:
        raise ValueError(f"{index} names the file {odd[0]!r}: it may name files of its own folder only")
    missing = sorted(shard for shard in set(places.values()) if not (folder / shard).is_file())
    if missing:
        raise FileNotFoundError(f"{folder}: {missing[0]} is missing, and the index needs it. Download it again")
    for name, shard in places.items():
        if name not in tensors or tensors[name].file != shard:
            raise ValueError(f"{folder}: {name} is not in {shard}, where the index has it. Download both again")
    for name, tensor in tensors.items():
        if name not in places:
            raise ValueError(f"{folder}: {tensor.file} holds {name}, which is not in the index. Remove the stray file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that has no name twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return entries
