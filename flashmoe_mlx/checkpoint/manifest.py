"""The digest of every expert of a checkpoint, in a file of its own: what its bytes were when they were right."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.system.atomic_write import replacing

FORMAT = "flashmoe_mlx manifest 2"


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

    def refuse_damaged(self, table: ExpertTable, expert: int, found: str) -> None:
        """Compare an expert's digest with what it was.

        Args:
            table (ExpertTable): its layer's.
            expert (int): its number.
            found (str): its :func:`digest`.

        Raises:
            OSError: they differ, or the manifest has no such expert.
        """
        known = self.layers.get(table.layer, [])
        if expert >= len(known):
            raise OSError(f"the manifest has no expert {expert} of {table.layer}: finish it with --write-manifest")
        if found != known[expert]:
            span = table.spans[expert][0]
            raise OSError(
                f"expert {expert} of {table.layer}, at offset {span.offset} of {span.path}, is not what the manifest "
                "has: the file was damaged or changed. Download it again"
            )


def digest(table: ExpertTable, buffers: Sequence[memoryview]) -> str:
    """XXH3 of the XXH3s of an expert's parts, so that parts can be read, and hashed, in any order."""
    return _joined(table, [xxhash.xxh3_64_digest(buffer) for buffer in buffers])


def _joined(table: ExpertTable, digests: Sequence[bytes]) -> str:
    """In alphabetical order of the parts, because a table's may change with mlx-lm."""
    of_parts = sorted(zip((part.name for part in table.parts), digests, strict=True))
    return xxhash.xxh3_64_hexdigest(b"".join(each for _, each in of_parts))


def _identity(path: str) -> list[Any]:
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        return [os.fstat(file.fileno()).st_size, xxhash.xxh3_64_hexdigest(header)]
