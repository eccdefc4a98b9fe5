"""A model folder: its config, and the span of every tensor. Trusts none of the files."""

import json
import os
import re
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from mlx_lm.utils import _download, load_config

from flashmoe_mlx.checkpoint.header import read_header
from flashmoe_mlx.checkpoint.hub_errors import one_line_hub_errors
from flashmoe_mlx.checkpoint.remote_code import reject_remote_code
from flashmoe_mlx.checkpoint.span import Span, Tensor

INDEX = "model.safetensors.index.json"

# A file name without a path.
_PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")


class Checkpoint:
    """A model folder in the layout of the Hugging Face Hub: config.json and safetensors files.

    Args:
        folder (Path): The folder, with files ``model*.safetensors``, as mlx-lm reads them, and their index if there are
            several.
        trust_remote_code (bool): Accept a config that names code to run. Default: ``False``.

    Attributes:
        folder (Path): The folder.
        config (dict): config.json, updated by generation_config.json.
        tensors (dict[str, Tensor]): Every tensor, by its name on disk.
        foreign_index (bool): The index belongs to another checkpoint, e.g. the one that this was converted from, and
            says nothing about these files.

    Raises:
        FileNotFoundError: config.json, the safetensors, or a file in the index is missing.
        ValueError: config.json or a header is damaged, files and index disagree, a file lies outside the folder, or the
            config names code to run and is not trusted.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.folder = folder
        self.config = read_config(folder)
        if not trust_remote_code:
            reject_remote_code(folder / "config.json", self.config)
        # Unlike glob(), this raises where the folder cannot be read.
        shards = sorted(file for file in folder.iterdir() if file.match("model*.safetensors"))
        # All links, not only shards, because mlx-lm and transformers read other files too.
        for file in sorted({*shards, *filter(Path.is_symlink, folder.iterdir())}):
            refuse_outside(file)
        if not shards:
            raise FileNotFoundError(f"{folder} has no model*.safetensors: there are no weights that mlx-lm can load")
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            first, entries = read_header(shard)
            for name, dtype, shape, begin, end in entries:
                if name in self.tensors:
                    both = f"{self.tensors[name].file} and {shard.name}"
                    raise ValueError(f"{folder}: {both} both hold {name}: remove the file of another checkpoint")
                self.tensors[name] = Tensor(dtype, shape, Span(str(shard), first + begin, end - begin))
        shards_of = _read_index(folder)
        self.foreign_index = _is_foreign(shards_of, self.tensors)
        if not self.foreign_index:
            _check_index(folder, shards_of, self.tensors)
        # Without multi-token-prediction layers: mlx-lm drops them, and they repeat the numbers of the model's layers.
        self._by_tail = {tail(name): name for name in self.tensors if "mtp" not in name.split(".")}

    @property
    def files(self) -> list[str]:
        """Return the paths of its safetensors files."""
        return sorted({tensor.span.path for tensor in self.tensors.values()})

    def find(self, name: str) -> str | None:
        """Return the name on disk of a tensor that mlx-lm calls ``name``, or ``None``.

        A model that is wrapped in another has other names before ``layers.<number>``, but the same ones after it.
        """
        return name if name in self.tensors else self._by_tail.get(tail(name))


def tail(name: str) -> str:
    """Return a name from its layer number on, or the whole name.

    >>> tail("language_model.model.layers.3.mlp.gate.weight")
    'layers.3.mlp.gate.weight'
    """
    match = re.search(r"(?:^|\.)(layers\.\d+\..*)$", name)
    return match[1] if match else name


def find_folder(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model; a hub repository is downloaded unless it is in the cache.

    Args:
        path_or_hf_repo (str or Path): A folder, or the name of a repository.
        revision (str, optional): Branch, tag or commit of the repository. Default: ``None``.

    Raises:
        FileNotFoundError: The path does not exist.
        NotADirectoryError: The path is a file.
        OSError: The hub cannot be reached, or has no such repository.
    """
    name = str(path_or_hf_repo)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix == ".gguf":
            raise NotADirectoryError(f"{path} is a GGUF file: get the model in the safetensors format instead")
        raise NotADirectoryError(f"{path} is a file: give the folder that holds config.json and the safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"no such folder: {path}")
    with one_line_hub_errors(f"no folder {name}, and it could not be downloaded from the Hugging Face Hub"):
        return Path(_download(name, revision=revision))


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, updated by generation_config.json.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It is damaged, or not the config of a model.
    """
    file = folder / "config.json"
    try:
        refuse_outside(file)
        config: dict[str, Any] = load_config(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model folder") from error
    except (UnicodeDecodeError, JSONDecodeError, RecursionError, AttributeError) as error:
        damaged = damaged_json(folder / "generation_config.json") or f"{file} is damaged ({error}): download it again"
        raise ValueError(damaged_json(file) or damaged) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} has no model_type: it is not the config of a model")
    if not isinstance(config.get("text_config", {}), dict | None):
        raise ValueError(f"{file} is damaged (text_config is not an object): download it again")
    return config


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model: all of it, unless it has a part of its own."""
    return config.get("text_config") or config


def damaged_json(file: Path) -> str | None:
    """Return a line about a file that exists and is not a JSON object, or ``None``.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        entries = json.loads(file.read_bytes().decode())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        return f"{file} is damaged ({error}): download it again"
    return None if isinstance(entries, dict) else f"{file} is damaged (it is not a JSON object): download it again"


def refuse_outside(file: Path) -> None:
    """Refuse a file that lies outside its folder, because a link could name any file of the machine.

    The hub's cache may link ``snapshots/<commit>/<name>`` to ``blobs/<hash>`` of the same repository.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file, or lies elsewhere.
    """
    folder = file.parent.resolve()
    homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        real = file.resolve(strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} is a link to itself: download it again") from error
    except FileNotFoundError as error:
        if not file.is_symlink():
            raise
        raise ValueError(f"{file} is a broken link: download it again") from error
    if real.parent not in homes:
        raise ValueError(f"{file} is a link to {real}, outside the model folder: replace it by the file")
    if not real.is_file():
        raise ValueError(f"{file} is not a file: download it again")


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor as the index has it; nothing if there is no index."""
    index = folder / INDEX
    if not os.path.lexists(index):
        return {}
    refuse_outside(index)
    try:
        shards: dict[str, str] = dict(json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"])
        odd = [shard for shard in shards.values() if not _PLAIN_NAME.fullmatch(shard)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): download it again") from error
    if odd:
        raise ValueError(f"{index} names the file {odd[0]!r}: it may only name files in its own folder")
    return shards


def _is_foreign(shards: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Tell if an index has most of the tensors on disk in other files, or not at all.

    One that is stale, or whose files are not complete, has most of those that are there where they are.
    """
    placed = sum(shards.get(name) == tensor.file for name, tensor in tensors.items())
    return bool(shards) and 2 * placed < len(tensors)


def _check_index(folder: Path, shards: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse an index that disagrees with the files, because a stale or missing shard would load as noise."""
    if not shards:
        return
    missing = sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file())
    if missing:
        raise FileNotFoundError(f"{folder}: {missing[0]} is in the index but missing: download it again")
    for name, shard in shards.items():
        if name not in tensors or tensors[name].file != shard:
            raise ValueError(f"{folder}: {name} is not in {shard}, as the index says: download both again")
    for name, tensor in tensors.items():
        if name not in shards:
            raise ValueError(f"{folder}: {tensor.file} holds {name}, which is not in the index: remove the stray file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, and refuse one that has a name twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return entries
