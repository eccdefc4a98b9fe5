"""Writing of calls under a constraint, token by token."""

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from flashmoe_mlx.constrain.parameter import escape


def fits(constraint: Any, tokenizer: Any, *texts: str) -> bool:
    """Say whether every token of the texts, each encoded by itself, is allowed in its place."""
    width, past = len(tokenizer.get_vocab()) + 8, [0]
    for token in (token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)):
        if constraint(mx.array(past[-1:]), mx.zeros((1, width)))[0, token].item() != 0:
            return False
        past.append(token)
    return True


def xml_call(arguments: dict[str, str], name: str = "f") -> str:
    """Return what a model writes for a call whose values are texts as they stand there."""
    body = "".join(f"<parameter={key}>\n{escape(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"\n<function={name}>\n{body}</function>\n"


def hermes_call(arguments: str, name: str = "f") -> str:
    """Return what a model writes for a call whose arguments are JSON."""
    escaped = arguments.replace("</tool_call>", "\\u003c/tool_call>")
    return f'\n{{"name": {json.dumps(name)}, "arguments": {escaped}}}\n'


def tool(schema: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    """Return a tool whose parameters have a schema."""
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def parameter(schema: Any, **more: Any) -> list[dict[str, Any]]:
    """Return one tool ``f`` with one required parameter ``x``."""
    return [tool({"type": "object", "properties": {"x": schema}, "required": ["x"]}, **more)]


def written(tokenizer: Any, call: str) -> Sequence[str]:
    """Return the parts of a call, its tags as tokens of their own."""
    return [tokenizer.tool_call_start, call, tokenizer.tool_call_end]
