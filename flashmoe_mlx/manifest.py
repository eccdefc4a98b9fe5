"""The digest of every expert of a checkpoint, in a file of its own: what its bytes were when they were right."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash

from flashmoe_mlx.atomic import replacing
from flashmoe_mlx.checkpoint import Checkpoint
from flashmoe_mlx.expert_table import ExpertTable

FORMAT = "flashmoe_mlx manifest 1"


@dataclass
class Manifest:
    """Digests of experts, and which checkpoint they belong to.

    It finds damage, not malice: XXH3 is fast, and anyone can make bytes that have a given one.

    Args:
        files (dict[str, list]): size and digest of the header of each safetensors file, by name.
        layers (dict[str, list[str]]): for each layer that is done, its experts' digests.
    """

    files: dict[str, list[Any]]
    layers: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """A checkpoint's, in which no layer is done.

        Raises:
            OSError: a file cannot be read.
        """
        return cls({Path(path).name: _identity(path) for path in checkpoint.files})

    @classmethod
    def load(cls, path: Path, checkpoint: Checkpoint) -> Self:
        """Read the manifest of a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another version, or of another checkpoint.
        """
        try:
            entries = json.loads(path.read_bytes())
            if entries["format"] != FORMAT:
                raise ValueError(f"{path} is {str(entries['format'])!r}, and this is {FORMAT!r}: write it anew")
            manifest = cls(
                dict(entries["files"]), {str(layer): list(each) for layer, each in entries["layers"].items()}
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such manifest: {path}. Write it with --write-manifest") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no manifest: {error!r}. Write it anew") from error
        here = cls.of(checkpoint).files
        for name in sorted(here.keys() | manifest.files.keys()):
            if here.get(name) != manifest.files.get(name):
                raise ValueError(f"{path} is not of {checkpoint.folder}: {name} is another file. Write it anew")
        return manifest

    def save(self, path: Path) -> None:
        """Write it, as a whole or not at all.

        Raises:
            OSError: that failed.
        """
        text = json.dumps({"format": FORMAT, "files": self.files, "layers": self.layers})
        with replacing(path) as unfinished:
            unfinished.write_text(text)

    def refuse_damaged(self, table: ExpertTable, expert: int, buffers: Sequence[memoryview]) -> None:
        """Compare an expert's bytes with its digest.

        Args:
            table (ExpertTable): its layer's.
            expert (int): its number.
            buffers (Sequence[memoryview]): the bytes of its parts, in the table's order.

        Raises:
            OSError: they differ, or the manifest has no such expert.
        """
        known = self.layers.get(table.layer, [])
        if expert >= len(known):
            raise OSError(f"the manifest has no expert {expert} of {table.layer}: finish it with --write-manifest")
        if digest(table, buffers) != known[expert]:
            span = table.spans[expert][0]
            raise OSError(
                f"expert {expert} of {table.layer}, at offset {span.offset} of {span.path}, is not what the manifest "
                "has: the file was damaged or changed. Download it again"
            )


class FirstReads:
    """Compares each expert with its digest when it is read for the first time.

    Args:
        manifest (Manifest): has the digests.
        tables (Iterable[ExpertTable]): of the layers.
    """

    def __init__(self, manifest: Manifest, tables: Iterable[ExpertTable]):
        self._manifest = manifest
        self._tables = {table.layer: table for table in tables}
        self._checked: set[tuple[str, int]] = set()

    def concern(self, layer: str, experts: Iterable[int]) -> bool:
        """Whether any of a layer's experts has not been compared yet."""
        return any((layer, expert) not in self._checked for expert in experts)

    def check(self, layer: str, expert: int, buffers: Sequence[memoryview]) -> None:
        """Compare an expert, unless that has been done.

        Raises:
            OSError: it is not what the manifest has.
        """
        if (layer, expert) not in self._checked:
            self._manifest.refuse_damaged(self._tables[layer], expert, buffers)
            self._checked.add((layer, expert))


def digest(table: ExpertTable, buffers: Sequence[memoryview]) -> str:
    """XXH3 of an expert's bytes, its parts in alphabetical order, because a table's may change with mlx-lm."""
    total = xxhash.xxh3_64()
    for _, buffer in sorted(zip((part.name for part in table.parts), buffers, strict=True), key=lambda pair: pair[0]):
        total.update(buffer)
    return total.hexdigest()


def _identity(path: str) -> list[Any]:
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        return [os.fstat(file.fileno()).st_size, xxhash.xxh3_64_hexdigest(header)]
