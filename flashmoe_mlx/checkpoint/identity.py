"""What tells one checkpoint from another."""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import xxhash

from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.hub_digests import downloaded_digests
from flashmoe_mlx.checkpoint.manifest import Manifest

_SAMPLE = 1 << 16  # bytes


def model_identity(folder: Path, settings: Mapping[str, str], trust_remote_code: bool = False) -> str:
    """What a state depends on besides the tokens, as a digest.

    Weights are known by the place, size, header and time of change of their files, a sample from the middle, and what
    the hub said of them. A copy of the same model may have another. A file changed in place has the same only if its
    time was set back and the change lies outside of the sample.

    Args:
        folder (Path): the checkpoint's.
        settings (Mapping[str, str]): how it is run, e.g. :func:`flashmoe_mlx.generation.prompt_cache.cache_settings`.
        trust_remote_code (bool): see :class:`Checkpoint`. Default: ``False``.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: it is damaged.
    """
    checkpoint = Checkpoint(folder, trust_remote_code)
    digests = downloaded_digests(folder)
    weights = [
        [name, *entry, digests.get(name), str((folder / name).resolve()), *_sample(folder / name)]
        for name, entry in Manifest.of(checkpoint).files.items()
    ]
    versions = [version(package) for package in ("mlx", "mlx-lm", "flashmoe-mlx")]
    parts = [weights, checkpoint.config, dict(settings), versions, mx.default_device().type.name]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sample(path: Path) -> tuple[int, str]:
    """When a file was changed, and a digest of bytes from its middle."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - _SAMPLE) // 2)
        return status.st_mtime_ns, xxhash.xxh3_64_hexdigest(file.read(_SAMPLE))


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from another in the same place: 64 hexadecimal digits.

    It is of the config and of the names, sizes and times of the weights, whose bytes would take minutes to read.

    Raises:
        OSError: config.json cannot be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
