"""Load an mlx-lm model whose experts stay on disk."""

import logging
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from flashmoe_mlx.checkpoint.folder import INDEX, Checkpoint, find_folder
from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.qwen3_next import fuse_decoder_layers
from flashmoe_mlx.model.adapters import check_adapters, load_adapters
from flashmoe_mlx.model.families import switch_layers, top_k_settings
from flashmoe_mlx.model.kernel_check import check_kernels
from flashmoe_mlx.model.swap import stream_experts
from flashmoe_mlx.model.tokenizer import load_tokenizer
from flashmoe_mlx.model.wiring import wire_model
from flashmoe_mlx.ops.dispatch import GPUS, Backend, choose_backend
from flashmoe_mlx.system.huge_pages import use_huge_pages
from flashmoe_mlx.system.text import brief

_LOG = logging.getLogger(__name__)


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    ram_budget: int | str | None = None,
    experts_per_token: int | None = None,
    config: str | Path | Config | None = None,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a Mixture-of-Experts model and its tokenizer; the routed experts stay in the checkpoint's files.

    The model is mlx-lm's own, so all of mlx-lm works on it, on one thread at a time. On a CPU it computes in float32,
    because MLX's CPU kernels are slow and inaccurate in half precision. Counters and sizes are at ``model.streaming``.

    An expert that cannot be read raises ReadError in the call that needs it, and the next call works. Layers with some
    of their experts in memory give slots back while the machine runs short of memory. MLX's cache limit is lowered to
    1/32 of all memory. On a GPU each kernel is compared with MLX's operations first; one that raises or differs is not
    used again in this process, and a warning says so. On a Mac's GPU, trunk, slots and a KV cache of 32,768 tokens are
    wired once.

    Args:
        path_or_hf_repo (str): A folder, or a repository of the Hugging Face Hub.
        tokenizer_config (dict, optional): Extra settings for the tokenizer. Default: ``None``.
        model_config (dict, optional): Entries that replace those of config.json. Default: ``None``.
        adapter_path (str, optional): LoRA adapters for the trunk. Default: ``None``.
        lazy (bool): Leave the trunk on disk too until it is used. Default: ``False``.
        return_config (bool): Return the model's config as the third item. Default: ``False``.
        revision (str, optional): Branch, tag or commit of the repository. Default: ``None``.
        trust_remote_code (bool): Run Python code that comes with the model. Default: ``False``.
        ram_budget (int or str, optional): Memory for cached experts, in bytes or as ``"12GB"``; 0 keeps one small pool
            on top of the OS page cache; ``"auto"`` takes what the machine can spare. Does not change the output.
            Default: the config's, or 0.
        experts_per_token (int, optional): Routed experts per token. Fewer than the checkpoint's own number read less
            and change the output. Default: the config's, or the checkpoint's.
        config (str, Path or Config, optional): A preset of the model's family (``"exact"``, ``"flash"``), a TOML file,
            or the settings themselves; the two arguments above override it. Default: ``None``.

    Returns:
        tuple: (model, tokenizer), or (model, tokenizer, config).

    Raises:
        FileNotFoundError: The folder, its config.json or one of its shards is missing.
        ValueError: Not a Mixture-of-Experts model, a damaged checkpoint, an unknown or impossible setting.
        MemoryError: Trunk and budget do not fit into free memory.
        OSError: The repository could not be downloaded, or a file not read.
    """
    checkpoint = Checkpoint(find_folder(path_or_hf_repo, revision), trust_remote_code)
    if not isinstance(config, Config):
        config = Config() if config is None else Config.load(config, checkpoint.config["model_type"])
    config = config.override(ram_budget=ram_budget, experts_per_token=experts_per_token)
    backend = choose_backend(config.kernels)
    model_config = model_config or {}
    native_top_k, change = top_k_settings(checkpoint.config | model_config, config.experts_per_token)
    asked = f" with experts_per_token {config.experts_per_token}" if change else ""
    model, loaded_config = load_lazily(checkpoint, model_config | change, trust_remote_code, asked)
    if adapter_path is not None:
        check_adapters(Path(adapter_path), switch_layers(model))
    model.streaming = stream_experts(model, checkpoint, config, native_top_k, backend)
    if not lazy:
        # One at a time, so that converting them needs no room for two trunks.
        for _, parameter in tree_flatten(model.parameters()):
            mx.eval(parameter)
            use_huge_pages(parameter)
    if adapter_path is not None:
        model = load_adapters(model, Path(adapter_path))
        model.eval()
    if not lazy and backend is not Backend.REFERENCE:
        fuse_decoder_layers(model, backend)
    # Native kernels are built and tested with the package, and MLX's products on a CPU take long.
    if backend in GPUS:
        check_kernels(model, max(1, model.streaming.experts_per_token), backend)
    wire_model(model)
    tokenizer_config = {"trust_remote_code": trust_remote_code} | (tokenizer_config or {})
    tokenizer = load_tokenizer(checkpoint.folder, tokenizer_config, loaded_config.get("eos_token_id"))
    return (model, tokenizer, loaded_config) if return_config else (model, tokenizer)


def load_lazily(
    checkpoint: Checkpoint, model_config: dict[str, Any], trust_remote_code: bool, asked: str = ""
) -> tuple[nn.Module, dict[str, Any]]:
    """Return mlx-lm's model of a checkpoint, of which nothing is read yet, and its config.

    Args:
        checkpoint (Checkpoint): The model's folder.
        model_config (dict): Entries that replace those of config.json.
        trust_remote_code (bool): Run Python code that comes with the model.
        asked (str): Describes the changed settings in an error.

    Raises:
        ValueError: mlx-lm cannot build it.
        OSError: A file cannot be read.
    """
    try:
        model, config = load_model(
            checkpoint.folder, lazy=True, model_config=model_config, trust_remote_code=trust_remote_code
        )
    except (OSError, MemoryError):
        raise
    # mlx-lm's families refuse a setting with errors of any other type.
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else brief(error)
        if checkpoint.foreign_index:
            reason += f". {INDEX} belongs to another checkpoint, so nothing else tells if a file is missing"
        raise ValueError(
            f"mlx-lm {version('mlx-lm')} cannot build {checkpoint.folder} from its config.json{asked}: {reason}. "
            "Update mlx-lm, or download the folder again"
        ) from error
    if checkpoint.foreign_index:
        _note_foreign_index(checkpoint.folder)
    return model, config


# A command may load a model several times.
@cache
def _note_foreign_index(folder: Path) -> None:
    _LOG.warning(
        "%s belongs to another checkpoint, and is ignored: the model's files have all that it needs", folder / INDEX
    )
