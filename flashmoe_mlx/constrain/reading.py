"""Reading of tool calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe_mlx.constrain.call import Call
from flashmoe_mlx.constrain.json_calls import read_json_call
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import read_xml_call


def format_of(tokenizer: Any) -> str:
    """Return the format of a model's calls: the name of mlx-lm's parser."""
    return str(getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2])


def read_calls(tokenizer: Any, text: str, tools: Sequence[Schema]) -> list[Call]:
    """Return the calls in a text between the tags of a call.

    Calls in the style of Qwen or Hermes keep the digits of their numbers; those in other formats are read by mlx-lm's
    parsers.

    Args:
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer. Its tool parser determines the format of calls.
        text (str): The text.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.

    Raises:
        ValueError: The text is no call.
    """
    kind = format_of(tokenizer)
    if kind == "json_tools":
        return [read_json_call(text)]
    if kind == "qwen3_coder":
        return [read_xml_call(text, tools)]
    try:
        found = tokenizer.tool_parser(text.strip(), list(tools))
        return [_call(each) for each in (found if isinstance(found, list) else [found])]
    # Parsers raise arbitrary exceptions on malformed calls.
    except Exception as error:
        raise ValueError(f"mlx-lm's parser cannot read the call: {error}") from error


def _call(found: Mapping[str, Any]) -> Call:
    arguments = json.dumps(found["arguments"], ensure_ascii=False, allow_nan=False)
    return Call(found["name"], arguments, found.get("id"))
