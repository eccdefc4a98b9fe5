"""States of the model after prefixes of prompts, in a folder that processes can share."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from mlx.utils import tree_flatten

from flashmoe_mlx.generation.prompt_cache import load_prompt_cache, save_prompt_cache
from flashmoe_mlx.system.atomic_write import sweep

_NAME = re.compile(r"[0-9a-f]{32}-([1-9][0-9]*)-[0-9a-f]{64}\.safetensors")
# Upper bound of the names and shapes in a file.
_HEADER_NBYTES = 1 << 16


class PrefixStore:
    """Keeps states in files, and deletes the least recently used ones when they take too much space.

    A state serves only prompts that begin with all of its tokens, because linear-attention state cannot be rolled back.
    Files that turn out to be damaged are deleted. All files are accessible to their owner only.

    Args:
        folder (Path): Created if it is missing. Others must not have access to it.
        max_bytes (int): Space for all files in it, those of other models included.
        identity (str): From :func:`flashmoe_mlx.checkpoint.identity.model_identity`. States of other identities are
            ignored.

    Raises:
        OSError: The folder cannot be created or written to.
        PermissionError: Others have access to it.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: str):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{folder} is accessible to others, and prompts are private: chmod 700 it or choose another folder"
            )
        sweep(folder)
        self._folder, self._max_bytes, self._identity = folder, max_bytes, identity

    @property
    def nbytes(self) -> int:
        """Space that all files take."""
        return sum(size for _, size, _ in self._files())

    def longest(self, tokens: Sequence[int], beyond: int = 0) -> tuple[list[Any], int] | None:
        """Return the state after the longest prefix of a prompt.

        Args:
            tokens (Sequence[int]): The prompt, without its last token if that is computed anyway.
            beyond (int): The prefix must be longer than this. Default: ``0``.

        Returns:
            tuple: (the model's cache, one item per layer; how many of the tokens it has seen), or ``None``.
        """
        lengths = {_length(path) for path in self._folder.glob(f"{self._identity}-*.safetensors")}
        digests = _digests(tokens, sorted(length for length in lengths if beyond < length <= len(tokens)))
        for length, digest in reversed(list(digests)):
            path = self._path(length, digest)
            if path.is_file() and (cache := self._read(path)) is not None:
                return cache, length
        return None

    def store(self, tokens: Sequence[int], cache: list[Any]) -> bool:
        """Write a state, unless it is there already.

        Args:
            tokens (Sequence[int]): All tokens that it has seen, at least one.
            cache (list): The model's cache, one item per layer.

        Returns:
            bool: False if the state alone is larger than ``max_bytes``.

        Raises:
            OSError: It cannot be written.
        """
        ((length, digest),) = _digests(tokens, [len(tokens)])
        path = self._path(length, digest)
        if path.is_file():
            _touch(path)
            return True
        nbytes = sum(array.nbytes for _, array in _leaves(cache) if isinstance(array, mx.array)) + _HEADER_NBYTES
        if nbytes > self._max_bytes:
            return False
        self._make_room(nbytes)
        save_prompt_cache(path, cache, {"name": path.stem, "content": _content(cache)}, 0o600)
        # Other processes may have written meanwhile.
        self._make_room(0)
        return True

    def _path(self, length: int, digest: str) -> Path:
        return self._folder / f"{self._identity}-{length}-{digest}.safetensors"

    def _read(self, path: Path) -> list[Any] | None:
        try:
            cache, metadata = load_prompt_cache(path)
            if metadata.get("name") != path.stem or metadata.get("content") != _content(cache):
                raise ValueError(f"{path} is damaged")
        # MLX raises RuntimeError when it cannot read a lazy array.
        except (ValueError, RuntimeError):
            path.unlink(missing_ok=True)
            return None
        _touch(path)
        return cache

    def _make_room(self, nbytes: int) -> None:
        """Delete the least recently used files until ``nbytes`` more fit."""
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) + nbytes - self._max_bytes
        for _, size, path in files:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield the time of last use, size and path of each file. Other files in the folder are not ours."""
        for path in filter(_length, self._folder.glob("*.safetensors")):
            # Another process may have deleted it.
            with suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _length(path: Path) -> int:
    """Return the number of tokens in the name of a file, or 0 if it is not a file of ours."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else 0


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield each length with the SHA-256 digest of that many tokens, so that no prompt can be forged to match another.

    Args:
        tokens (Sequence[int]): The prompt.
        lengths (Sequence[int]): Lengths of prefixes, in rising order.
    """
    array, total, begin = np.asarray(tokens, dtype="<u4"), hashlib.sha256(), 0
    for length in lengths:
        total.update(array[begin:length].tobytes())
        yield length, total.hexdigest()
        begin = length


def _leaves(cache: list[Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = tree_flatten([layer.state for layer in cache])
    return flat


def _content(cache: list[Any]) -> str:
    """Return a checksum (XXH3) of a cache. It detects damage, not tampering."""
    total = xxhash.xxh3_128(" ".join(type(layer).__name__ for layer in cache).encode())
    for name, leaf in _leaves(cache):
        if isinstance(leaf, mx.array):
            total.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
            total.update(np.asarray(mx.contiguous(leaf).reshape(-1).view(mx.uint8)).data)
        else:
            total.update(f"{name} {leaf!r}".encode())
    return total.hexdigest()


def _touch(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(path)
