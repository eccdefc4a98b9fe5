"""A model folder -> its config and which span of which file holds which tensor. Trusts no header."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx_lm.utils import _download, load_config
from safetensors import SafetensorError, safe_open

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
"""safetensors' dtypes that MLX holds in memory as they are on disk."""


class Span(NamedTuple):
    """``nbytes`` bytes of the file ``path`` from ``offset`` on."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its safetensors ``dtype``, its ``shape`` and the ``span`` that holds it."""

    dtype: str
    shape: tuple[int, ...]
    span: Span

    @property
    def file(self) -> str:
        """The name of its file in the checkpoint's folder."""
        return Path(self.span.path).name

    def block(self, number: int, count: int) -> Span:
        """The span of one of ``count`` equal blocks that the tensor is cut into along its bytes."""
        path, offset, nbytes = self.span
        return Span(path, offset + number * (nbytes // count), nbytes // count)


class Checkpoint:
    """A model folder in the layout of the Hugging Face hub: config.json and safetensors files.

    Args:
        folder (Path): holds ``model*.safetensors``, as mlx-lm reads them, and their index if there are several.

    Attributes:
        config (dict): config.json, with what generation_config.json adds.
        tensors (dict[str, Tensor]): every tensor by its name on disk.

    Raises:
        FileNotFoundError: config.json or the safetensors are missing, or a file that the index names.
        ValueError: config.json or a header is damaged, or files and index disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        shards = sorted(folder.glob("model*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"no model*.safetensors in {folder}: there are no weights that mlx-lm can load")
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in _read_header(shard):
                if name in self.tensors:
                    both = f"{self.tensors[name].file} and {shard.name}"
                    raise ValueError(f"{folder}: {both} both hold {name}: remove the one that is not this checkpoint's")
                self.tensors[name] = tensor
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
    try:
        config: dict[str, Any] = load_config(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no config.json in {folder}: not a model folder") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}. Download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} names no model_type: not a model's config")
    return config


def _read_header(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one safetensors file, by name."""
    try:
        # The library's own reader refuses what does not add up: sizes, overlaps, holes, truncation.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not complete: {error}. Download it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensor = Tensor(entry["dtype"], tuple(entry["shape"]), Span(str(path), 8 + length + begin, end - begin))
        dtype = DTYPES.get(tensor.dtype)
        if dtype is not None and prod(tensor.shape) * dtype.size != tensor.span.nbytes:
            raise ValueError(f"{path} is damaged: {name} has {tensor.span.nbytes} bytes for {list(tensor.shape)}")
        yield name, tensor


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Files and index must tell the same story: a stale or missing shard would load as noise."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        places: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        missing = sorted(shard for shard in set(places.values()) if not (folder / shard).is_file())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}. Download it again") from error
    if missing:
        raise FileNotFoundError(f"{folder}: {missing[0]} is missing, and the index needs it. Download it again")
    for name, shard in places.items():
        if name not in tensors or tensors[name].file != shard:
            raise ValueError(f"{folder}: {name} is not in {shard}, where the index has it. Download both again")
    for name, tensor in tensors.items():
        if name not in places:
            raise ValueError(f"{folder}: {tensor.file} holds {name}, which is not in the index. Remove the stray file")
