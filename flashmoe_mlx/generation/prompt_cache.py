"""The state after a prompt, in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from flashmoe_mlx.system.atomic_write import replacing


def cache_path(name: str) -> Path:
    """The file of that name; ``.safetensors`` is added where it is missing, as MLX knows its files by it."""
    return Path(name if name.endswith(".safetensors") else f"{name}.safetensors").expanduser()


def save_prompt_cache(path: Path, cache: list[Any], metadata: dict[str, str], mode: int = 0o666) -> None:
    """mlx-lm's ``save_prompt_cache``; whatever interrupts it, ``path`` is the old file or the new one.

    Args:
        path (Path): ends in ``.safetensors``.
        cache (list): the model's, one item a layer.
        metadata (dict[str, str]): what to keep with it.
        mode (int): the file's permissions, of which the process's umask may take some.

    Raises:
        OSError: the file cannot be written, e.g. because the disk is full.
    """
    try:
        with replacing(path, mode) as unfinished:
            mlx_cache.save_prompt_cache(str(unfinished), cache, metadata)
    except RuntimeError as error:  # how MLX says so
        nbytes = sum(item.nbytes for item in cache)
        raise OSError(f"cannot write {path}: {error}. It needs {nbytes / 1e6:.1f} MB: make room on the disk") from error


def load_prompt_cache(path: Path) -> tuple[list[Any], dict[str, str]]:
    """mlx-lm's ``load_prompt_cache``.

    Returns:
        tuple: (cache, metadata). Its arrays are read when they are used.

    Raises:
        ValueError: the file is missing, damaged, cut off, or something else than a prompt cache.
    """
    try:
        cache, metadata = mlx_cache.load_prompt_cache(str(path), return_metadata=True)
        return list(cache), dict(metadata)
    except Exception as error:  # mlx-lm unpacks what it finds, and stumbles in any way over what is no cache
        raise ValueError(f"{path} is damaged or not a prompt cache: {error}. Make it again") from error


@dataclass(frozen=True)
class RestoredPrompt:
    """A prompt's state from a file that a cache_prompt command wrote, mlx-lm's or ours.

    Args:
        path (Path): the file.
        cache (list): the model's cache, one item a layer.
        metadata (dict[str, str]): mlx-lm's ``model`` and ``tokenizer_config``; ours adds the settings that the state
            depends on.
    """

    path: Path
    cache: list[Any]
    metadata: dict[str, str]

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, cut off, or something else than a prompt cache.
        """
        path = cache_path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no such prompt cache: {path}. Make it with flashmoe_mlx.cache_prompt")
        cache, metadata = load_prompt_cache(path)
        if not {"model", "tokenizer_config"} <= set(metadata):
            raise ValueError(f"{path} does not name its model: only files of a cache_prompt command can be continued")
        return cls(path, cache, metadata)

    def same_model(self, model: str) -> str:
        """``model``, if it is another way to write the one the file is of.

        Raises:
            ValueError: it is another model.
        """
        own = self.metadata["model"]
        folders = Path(model).expanduser(), Path(own).expanduser()
        if model == own or (all(f.is_dir() for f in folders) and folders[0].samefile(folders[1])):
            return model
        raise ValueError(f"{self.path} was made with model {own}, not {model}: leave out --model or make it again")

    def refuse_other_model(self, model: nn.Module, adapter_path: str | None) -> None:
        """Refuse to continue with what would not have computed this state.

        Args:
            model (nn.Module): the one that is to continue, from :func:`flashmoe_mlx.load`.
            adapter_path (str, optional): its LoRA adapters.

        Raises:
            ValueError: it has other layers, or a setting differs.
        """
        layers = len(mlx_cache.make_prompt_cache(model))
        if len(self.cache) != layers:
            raise ValueError(f"{self.path} is of {len(self.cache)} layers, and the model has {layers}: make it again")
        for name, now in cache_settings(model, adapter_path).items():
            then = self.metadata.get(name, now)  # mlx-lm's own files do not say
            if then != now:
                raise ValueError(
                    f"{self.path} was made with {name} {then or 'none'}, and now it is {now or 'none'}: "
                    "continue with the same or make it again"
                )


def cache_settings(model: nn.Module, adapter_path: str | None) -> dict[str, str]:
    """What the state depends on besides the model's name; the size of its experts tells one in the same place apart."""
    return {
        "experts_per_token": str(model.streaming.experts_per_token),
        "experts_nbytes": str(model.streaming.experts_nbytes),
        "adapter_path": "" if adapter_path is None else str(Path(adapter_path).resolve()),
    }
