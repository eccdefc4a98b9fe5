"""Prompt caches in files: the state of the model after a prompt."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.generation.kv_cache import fit_rotating
from flashmoe_mlx.system.atomic_write import replacing


def cache_path(name: str) -> Path:
    """Return the path of a prompt cache, with ``.safetensors`` added if it is missing: MLX requires it."""
    return Path(name if name.endswith(".safetensors") else f"{name}.safetensors").expanduser()


def save_prompt_cache(path: Path, cache: list[Any], metadata: dict[str, str], mode: int = 0o666) -> None:
    """Save a prompt cache as mlx-lm does, but atomically: if interrupted, ``path`` is still the old file.

    Args:
        path (Path): Ends in ``.safetensors``.
        cache (list): The model's cache, one item per layer.
        metadata (dict[str, str]): Saved with it.
        mode (int): Permissions of the file, before the umask. Default: ``0o666``.

    Raises:
        OSError: The file cannot be written, e.g. because the disk is full.
    """
    try:
        with replacing(path, mode) as unfinished:
            mlx_cache.save_prompt_cache(str(unfinished), cache, metadata)
    # MLX reports failed writes as RuntimeError.
    except RuntimeError as error:
        nbytes = sum(item.nbytes for item in cache)
        raise OSError(f"cannot write {path}: {error}. It needs {nbytes / 1e6:.1f} MB: free some space") from error


def load_prompt_cache(path: Path) -> tuple[list[Any], dict[str, str]]:
    """Load a prompt cache as mlx-lm does, but with one type of error.

    Returns:
        tuple: (cache, metadata). The arrays are lazy: they are read from the file when they are used.

    Raises:
        ValueError: The file is missing, damaged, truncated, or not a prompt cache.
    """
    try:
        cache, metadata = mlx_cache.load_prompt_cache(str(path), return_metadata=True)
        return fit_rotating(cache), dict(metadata)
    # mlx-lm raises arbitrary exceptions on files that are not prompt caches.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a prompt cache: {error}. Create it again") from error


@dataclass(frozen=True)
class RestoredPrompt:
    """A prompt cache from a file that mlx-lm's cache_prompt command or ours wrote.

    Args:
        path (Path): The file.
        cache (list): The model's cache, one item per layer.
        metadata (dict[str, str]): mlx-lm's ``model`` and ``tokenizer_config``. Our command adds the ``checkpoint``'s
            identity and the settings that the state depends on.
    """

    path: Path
    cache: list[Any]
    metadata: dict[str, str]

    @classmethod
    def load(cls, name: str) -> Self:
        """Load a file.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It is damaged, truncated, or not a prompt cache.
        """
        path = cache_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no such prompt cache: {path}. Create it with flashmoe_mlx.cache_prompt")
        cache, metadata = load_prompt_cache(path)
        if not {"model", "tokenizer_config"} <= set(metadata):
            raise ValueError(f"{path} does not name its model: only files of a cache_prompt command can be continued")
        return cls(path, cache, metadata)

    @property
    def tokens(self) -> int:
        """Tokens that the state has seen; 0 if no layer counts them."""
        return max((getattr(layer, "offset", 0) for layer in self.cache), default=0)

    def same_model(self, model: str) -> str:
        """Return ``model`` if it names the model of this file, which may have been named in another way.

        Raises:
            ValueError: It is another model.
        """
        own = self.metadata["model"]
        folders = Path(model).expanduser(), Path(own).expanduser()
        if model == own or (all(f.is_dir() for f in folders) and folders[0].samefile(folders[1])):
            return model
        raise ValueError(f"{self.path} was made with model {own}, not {model}: leave out --model or create it again")

    def refuse_changed_checkpoint(self, model: str, trust_remote_code: bool) -> None:
        """Refuse a model whose files have changed since this file was made.

        mlx-lm's own files do not say which weights they were made with, which is logged as a warning.

        Args:
            model (str): A folder or a repository, from :meth:`same_model`.
            trust_remote_code (bool): See :class:`flashmoe_mlx.checkpoint.folder.Checkpoint`.

        Raises:
            ValueError: A file of the model has changed.
            OSError: A file cannot be read.
        """
        then = self.metadata.get("checkpoint")
        if then is None:
            logging.warning("%s does not say which weights it was made with: they are not checked", self.path)
        elif then != checkpoint_identity(model, trust_remote_code):
            raise ValueError(f"the files of {model} have changed since {self.path} was made: create it again")

    def refuse_other_model(self, model: nn.Module, adapter_path: str | None) -> None:
        """Refuse a model that would not have computed this state.

        Args:
            model (nn.Module): The model to continue with, from :func:`flashmoe_mlx.load`.
            adapter_path (str, optional): Its LoRA adapters.

        Raises:
            ValueError: The number of layers or a setting differs.
        """
        layers = len(mlx_cache.make_prompt_cache(model))
        if len(self.cache) != layers:
            raise ValueError(f"{self.path} is of {len(self.cache)} layers, and the model has {layers}: create it again")
        for name, now in cache_settings(model, adapter_path).items():
            # mlx-lm's own files do not have the settings.
            then = self.metadata.get(name, now)
            if then != now:
                raise ValueError(
                    f"{self.path} was made with {name} {then or 'none'}, and now it is {now or 'none'}: "
                    "continue with the same or create it again"
                )


def checkpoint_identity(model: str, trust_remote_code: bool) -> str:
    """Return what the metadata of a file calls ``checkpoint``, see :func:`model_identity`.

    Args:
        model (str): A folder or a repository.
        trust_remote_code (bool): See :class:`flashmoe_mlx.checkpoint.folder.Checkpoint`.
    """
    return model_identity(find_folder(model), trust_remote_code=trust_remote_code)


def cache_settings(model: nn.Module, adapter_path: str | None) -> dict[str, str]:
    """Return the settings that a state depends on, besides the checkpoint.

    Args:
        model (nn.Module): From :func:`flashmoe_mlx.load`.
        adapter_path (str, optional): Its LoRA adapters.
    """
    adapter = None if adapter_path is None else Path(adapter_path).resolve()
    return {
        "experts_per_token": str(model.streaming.experts_per_token),
        "adapter_path": "" if adapter is None else str(adapter),
        "adapter_digest": "" if adapter is None else _digest(adapter),
    }


def _digest(adapter: Path) -> str:
    """Return a digest of the files of LoRA adapters, which are small."""
    total = hashlib.sha256()
    for name in ("adapter_config.json", "adapters.safetensors"):
        total.update((adapter / name).read_bytes())
    return total.hexdigest()[:32]
