"""Rejects configs that could make a program run code that comes with a model or from the Hugging Face Hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Entries by which transformers fetches compiled kernels.
_KERNELS = ("kernel_config", "use_kernels")
# Entries that choose a kernel by a word, such as "sdpa". One such as "owner/name" is fetched from the hub.
_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)


def reject_remote_code(file: Path, config: Mapping[str, Any]) -> None:
    """Reject a config with an entry that names code to run.

    ``auto_map`` is not such an entry. It names classes for transformers, which runs them only if ``trust_remote_code``
    is set: the model is always mlx-lm's own class, and transformers refuses a tokenizer that has only its repository's.

    Args:
        file (Path): The file that the config is from.
        config (Mapping[str, Any]): Its content.

    Raises:
        ValueError: An entry names code to run.
    """
    for key, value in _entries(config):
        if (
            (key == "model_file" and value is not None)
            or (key in _KERNELS and value)
            or (key in _IMPLEMENTATIONS and "/" in str(value))
        ):
            raise ValueError(
                f"{file} asks for code to be run: {key} is {value!r}. If you trust this model's authors, pass "
                "trust_remote_code=True or --trust-remote-code; else use another copy of the model"
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config and of the configs in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value)
