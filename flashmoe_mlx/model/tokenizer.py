"""Load a model's tokenizer. An error is one line that names the file that caused it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_lm.utils
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateSyntaxError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from flashmoe_mlx.checkpoint.folder import damaged_json
from flashmoe_mlx.system.text import brief

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Entries of tokenizer_config.json that name modules of mlx-lm, by the package of the modules.
_MODULES = {"mlx_lm.tool_parsers": "tool_parser_type", "mlx_lm.chat_templates": "chat_template_type"}


def load_tokenizer(
    folder: Path, settings: Mapping[str, Any] | None = None, eos_token_ids: int | list[int] | None = None
) -> TokenizerWrapper:
    """Load a tokenizer as mlx-lm does, and check that its chat template can be compiled.

    Args:
        folder (Path): The model's folder.
        settings (Mapping, optional): Entries that replace those of tokenizer_config.json. Default: ``None``.
        eos_token_ids (int or list[int], optional): Tokens that end a text. Default: ``None``, the tokenizer's own.

    Raises:
        ValueError: A file is damaged, or of a later version than the installed libraries.
        OSError: A file cannot be read.
    """
    # transformers asks at the terminal if code of the model may run, unless it is told.
    settings = {"trust_remote_code": False} | dict(settings or {})
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(folder, settings, eos_token_ids=eos_token_ids)
        # Some settings have an effect only now.
        tokenizer.encode("heron")
    # The libraries raise errors of all types, a plain Exception among them.
    except Exception as error:
        raise ValueError(_cause(folder, error)) from error
    _check_templates(
        tokenizer.chat_template, "--chat-template" if "chat_template" in settings else template_file(folder)
    )
    return tokenizer


def template_file(folder: Path) -> Path:
    """Return the file of a model folder that has the chat template."""
    separate = folder / "chat_template.jinja"
    return separate if separate.is_file() else folder / "tokenizer_config.json"


def _cause(folder: Path, error: Exception) -> str:
    """Return one line about the file that an error comes from.

    Raises:
        OSError: A file cannot be read.
    """
    if isinstance(error, OSError) and error.filename is not None:
        raise error
    for name in _JSON_FILES:
        if damaged := damaged_json(folder / name):
            return damaged
    config = folder / "tokenizer_config.json"
    if isinstance(error, ModuleNotFoundError):
        for package, entry in _MODULES.items():
            if (error.name or "").startswith(package):
                name = str(error.name).removeprefix(f"{package}.")
                return (
                    f"{config}: mlx-lm {version('mlx-lm')} has no {entry} {name!r}: update mlx-lm or remove the entry"
                )
    if isinstance(error, StrictDataclassError):
        return f"transformers cannot read {folder / 'config.json'} ({brief(error)}): download it again"
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            Tokenizer.from_file(str(file))
        elif not any(folder.glob("tokenizer*.model")) and not any(folder.glob("*.tiktoken")):
            return f"{folder} has no tokenizer.json, and no other tokenizer ({brief(error)}): download it again"
    except Exception as damage:
        installed = f"tokenizers {version('tokenizers')}"
        return f"{file} cannot be read by {installed} ({brief(damage)}): update transformers, or download it again"
    if isinstance(error, UnicodeDecodeError):
        config = template_file(folder)
    return f"transformers cannot load the tokenizer with {config} ({brief(error)}): download it again"


def _check_templates(templates: object, source: object) -> None:
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template is None:
            continue
        if not isinstance(template, str):
            raise ValueError(f"{source} is damaged (the chat template is not a text): download it again")
        try:
            _compile_jinja_template(template)
        except TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {brief(error)}"
            raise ValueError(f"{source}: the chat template has a syntax error ({reason}): download it again") from error
        except RecursionError as error:
            raise ValueError(f"{source}: the chat template is nested too deeply: download it again") from error
