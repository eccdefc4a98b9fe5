"""Tells one checkpoint from another without reading its weights."""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash

from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.hub_digests import downloaded_digests

# Bytes from the middle of each file.
_SAMPLE_NBYTES = 1 << 16


def header_identities(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Return the size and the XXH3 of the header of each safetensors file, by the file's name.

    Copies of a checkpoint have the same, wherever they are: it says which tensors lie where, not what they hold.

    Raises:
        OSError: A file cannot be read.
    """
    return {Path(path).name: _header_identity(path) for path in checkpoint.files}


def model_identity(folder: Path, settings: Mapping[str, str] | None = None, trust_remote_code: bool = False) -> str:
    """Return a digest that differs if a checkpoint differs, for what is derived from it and kept.

    It covers config.json, generation_config.json, and for each safetensors file its name and path, size, header, time
    of modification, 64 KiB from its middle, and the digest that the hub gave with a download. It does not cover all
    weights, which take minutes to read: a file that was changed in place goes unnoticed if its time was set back and
    the sample is the same. It covers the path, so a copy of a checkpoint has another digest.

    Args:
        folder (Path): The checkpoint.
        settings (Mapping[str, str], optional): What else the derived data depends on; see :func:`numeric_settings`.
            Default: ``None``.
        trust_remote_code (bool): See :class:`Checkpoint`. Default: ``False``.

    Returns:
        str: 32 hexadecimal digits.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    checkpoint = Checkpoint(folder, trust_remote_code)
    digests = downloaded_digests(folder)
    files = [
        [name, *identity, digests.get(name), str((folder / name).resolve()), *_sample(folder / name)]
        for name, identity in header_identities(checkpoint).items()
    ]
    parts = [files, checkpoint.config, dict(settings or {})]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def numeric_settings() -> dict[str, str]:
    """Return what the bits of a model's output depend on besides the model: device and versions."""
    versions = {package: version(package) for package in ("mlx", "mlx-lm", "flashmoe-mlx")}
    return versions | {"device": mx.default_device().type.name}


def _header_identity(path: str) -> list[Any]:
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        return [os.fstat(file.fileno()).st_size, xxhash.xxh3_64_hexdigest(header)]


def _sample(path: Path) -> tuple[int, str]:
    """Return the time of modification, and the digest of bytes from the middle."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - _SAMPLE_NBYTES) // 2)
        return status.st_mtime_ns, xxhash.xxh3_64_hexdigest(file.read(_SAMPLE_NBYTES))
