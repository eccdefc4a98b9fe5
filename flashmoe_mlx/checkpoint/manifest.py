"""Digests of every expert of a checkpoint, written while its bytes were right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.identity import header_identities
from flashmoe_mlx.system.atomic_write import replacing

FORMAT = "flashmoe_mlx manifest 2"


@dataclass
class Manifest:
    """Digests of experts, and the checkpoint that they belong to.

    It finds damage, not tampering: XXH3 is fast, but bytes with a given digest can be constructed.

    Args:
        files (dict[str, list]): :func:`header_identities` of the checkpoint.
        layers (dict[str, list[str]]): For each layer that is complete, the digests of its experts.
    """

    files: dict[str, list[Any]]
    layers: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Return a manifest of a checkpoint without any layer.

        Raises:
            OSError: A file cannot be read.
        """
        return cls(header_identities(checkpoint))

    @classmethod
    def load(cls, path: Path, checkpoint: Checkpoint) -> Self:
        """Read the manifest of a checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, of another format, or of another checkpoint.
        """
        try:
            entries = json.loads(path.read_bytes())
            if entries["format"] != FORMAT:
                raise ValueError(f"{path} has the format {str(entries['format'])!r}, not {FORMAT!r}: write it again")
            manifest = cls(
                dict(entries["files"]), {str(layer): list(each) for layer, each in entries["layers"].items()}
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such manifest: {path}. Write it with --write-manifest") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a manifest ({error!r}): write it again") from error
        here = header_identities(checkpoint)
        for name in sorted(here.keys() | manifest.files.keys()):
            if here.get(name) != manifest.files.get(name):
                raise ValueError(
                    f"{path} belongs to another checkpoint than {checkpoint.folder}, {name} differs: write it again"
                )
        return manifest

    def save(self, path: Path) -> None:
        """Write the manifest, completely or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        text = json.dumps({"format": FORMAT, "files": self.files, "layers": self.layers})
        with replacing(path) as unfinished:
            unfinished.write_text(text)

    def refuse_damaged(self, table: ExpertTable, expert: int, found: str) -> None:
        """Refuse an expert whose digest has changed.

        Args:
            table (ExpertTable): The table of its layer.
            expert (int): Its number.
            found (str): Its :func:`digest` now.

        Raises:
            OSError: The digests differ, or the manifest has no such expert.
        """
        known = self.layers.get(table.layer, [])
        if expert >= len(known):
            raise OSError(f"the manifest has no expert {expert} of {table.layer}: complete it with --write-manifest")
        if found != known[expert]:
            span = table.spans[expert][0]
            raise OSError(
                f"expert {expert} of {table.layer}, at offset {span.offset} of {span.path}, differs from the manifest: "
                "the file was damaged or changed, download it again"
            )


def digest(table: ExpertTable, buffers: Sequence[memoryview]) -> str:
    """Return the XXH3 of the XXH3s of an expert's parts, so that parts can be read and hashed in any order.

    Args:
        table (ExpertTable): The table of its layer.
        buffers (Sequence[memoryview]): The bytes of each part.
    """
    return join_digests(table, [xxhash.xxh3_64_digest(buffer) for buffer in buffers])


def join_digests(table: ExpertTable, digests: Sequence[bytes]) -> str:
    """Return the digest of an expert, given those of its parts in the order of the table.

    They are joined in alphabetical order of the parts, because the order in a table may change with mlx-lm.
    """
    named = sorted(zip((part.name for part in table.parts), digests, strict=True))
    return xxhash.xxh3_64_hexdigest(b"".join(each for _, each in named))
