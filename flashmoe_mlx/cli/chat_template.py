"""Chat templates of commands: one from a file, and a prompt rendered with a model's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.model.tokenizer import template_file
from flashmoe_mlx.system.text import brief, read_text


def read_chat_template(text_or_file: str) -> str:
    """Return the template that a flag gives, as text or as the path of a file with it.

    Raises:
        FileNotFoundError: It is neither a file nor a template, which has braces.
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8.
    """
    file = Path(text_or_file).expanduser()
    if "{" not in text_or_file or (len(text_or_file) < 256 and file.is_file()):
        if not file.exists():
            raise FileNotFoundError(f"no such chat template: {file}. Give a file, or the template itself")
        return read_text(file)
    return text_or_file


def render(tokenizer: TokenizerWrapper, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
    """Return a conversation as the model's chat template renders it.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        messages (Sequence[dict]): The conversation.
        options (Any): Other arguments of ``apply_chat_template``.

    Raises:
        ValueError: The template fails, or refuses the conversation.
    """
    # Templates raise errors of many types, most of them their own.
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:
        file = template_file(Path(tokenizer.name_or_path))
        raise ValueError(f"the chat template in {file} rejects this prompt: {brief(error)}") from error
