"""The state after the beginnings of prompts, in a folder that outlives the process and that several may share."""

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
_HEADER_NBYTES = 1 << 16  # names and shapes in a file, at most


class PrefixStore:
    """Prompt caches on disk. The ones that have not been used for the longest time leave when there are too many.

    A prefix is of use only as a whole, because the state of linear attention has no way back. A file that is damaged
    or of something else is removed when it is met. All files are their owner's alone.

    Args:
        folder (Path): made if it is missing. Nobody else may have access to it.
        limit_bytes (int): what all files in it may take, those of other models too.
        identity (str): from :func:`model_identity`; other models' states are not seen.

    Raises:
        OSError: the folder cannot be made or written to.
        PermissionError: others have access to it.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: str):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{folder} is open to others, and prompts are private: chmod 700 it, or choose another"
            )
        sweep(folder)
        self._folder, self._limit, self._identity = folder, limit_bytes, identity

    @property
    def nbytes(self) -> int:
        """What all files take."""
        return sum(size for _, size, _ in self._files())

    def longest(self, tokens: Sequence[int], beyond: int = 0) -> tuple[list[Any], int] | None:
        """The state after the longest prefix of a prompt that there is one of.

        Args:
            tokens (Sequence[int]): the prompt, without its last token if that is to be computed in any case.
            beyond (int): it must be longer than this. Default: ``0``.

        Returns:
            tuple: (the model's cache, one item a layer; how many tokens it has seen), or ``None``.
        """
        lengths = {
            int(part) for path in self._folder.glob(f"{self._identity}-*.safetensors") if (part := _length(path))
        }
        digests = _digests(tokens, sorted(length for length in lengths if beyond < length <= len(tokens)))
        for length, digest in reversed(list(digests)):
            path = self._path(length, digest)
            if path.is_file() and (cache := self._read(path)) is not None:
                return cache, length
        return None

    def store(self, tokens: Sequence[int], cache: list[Any]) -> bool:
        """Keep a state.

        Args:
            tokens (Sequence[int]): all that it has seen, at least one.
            cache (list): the model's, one item a layer.

        Returns:
            bool: whether it is there now; it is not if it alone is over the limit.

        Raises:
            OSError: it cannot be written.
        """
        ((length, digest),) = _digests(tokens, [len(tokens)])
        path = self._path(length, digest)
        if path.is_file():
            _touch(path)
            return True
        nbytes = sum(array.nbytes for _, array in _leaves(cache) if isinstance(array, mx.array)) + _HEADER_NBYTES
        if nbytes > self._limit:
            return False
        self._make_room(nbytes)
        save_prompt_cache(path, cache, {"name": path.stem, "content": _content(cache)}, 0o600)
        self._make_room(0)  # others may have written meanwhile
        return True

    def _path(self, length: int, digest: str) -> Path:
        return self._folder / f"{self._identity}-{length}-{digest}.safetensors"

    def _read(self, path: Path) -> list[Any] | None:
        try:
            cache, metadata = load_prompt_cache(path)
            if metadata.get("name") != path.stem or metadata.get("content") != _content(cache):
                raise ValueError(f"{path} is not what was written")
        except (ValueError, RuntimeError):  # MLX reads an array when it is used, and says so by a RuntimeError
            path.unlink(missing_ok=True)
            return None
        _touch(path)
        return cache

    def _make_room(self, nbytes: int) -> None:
        """Remove the files that have not been used for the longest time until ``nbytes`` more fit."""
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) + nbytes - self._limit
        for _, size, path in files:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used last, its size, and its path; of nothing else that the folder may hold."""
        for path in filter(_length, self._folder.glob("*.safetensors")):
            with suppress(FileNotFoundError):  # another process has removed it
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _length(path: Path) -> int:
    """How many tokens a file is of by its name, or 0 if it has another kind of name."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else 0


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Some lengths, in rising order, and SHA-256 of so many tokens: no prompt can be made that looks like another."""
    array, total, begin = np.asarray(tokens, dtype="<u4"), hashlib.sha256(), 0
    for length in lengths:
        total.update(array[begin:length].tobytes())
        yield length, total.hexdigest()
        begin = length


def _leaves(cache: list[Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = tree_flatten([layer.state for layer in cache])
    return flat


def _content(cache: list[Any]) -> str:
    """XXH3 of everything in a cache: it finds damage, not malice."""
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
