"""Entries of a model's config.json that could make a program run code that comes with the model, or from a hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What transformers would fetch compiled kernels by.
_KERNELS = ("kernel_config", "use_kernels")
# These choose a kernel by a word, such as "sdpa". As "owner/name" it is fetched from the hub.
_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)


def refuse_code(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse entries that name code to run.

    ``auto_map`` is no such entry: it names classes for transformers, which are asked for only where
    ``trust_remote_code`` is given. The model is always mlx-lm's own class, and where a tokenizer has none but its
    repository's, transformers refuses it.

    Args:
        file (Path): where the config is from.
        config (Mapping[str, Any]): what it holds.

    Raises:
        ValueError: it names code to run.
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
    """Those of a config and of the configs in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value)
