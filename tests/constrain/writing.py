"""Writing of calls under a constraint, token by token, and reading them back."""

import json
import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from flashmoe_mlx.constrain import constrained, read_calls
from flashmoe_mlx.constrain.parameter import escape
from flashmoe_mlx.constrain.reading import format_of


def tool(schema: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    """Return a tool whose parameters have a schema."""
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def parameter(schema: Any, **more: Any) -> list[dict[str, Any]]:
    """Return one tool ``f`` with one required parameter ``x``."""
    return [tool({"type": "object", "properties": {"x": schema}, "required": ["x"]}, **more)]


def fits(constraint: Any, tokenizer: Any, *texts: str) -> bool:
    """Say whether every token of the texts, each encoded by itself, is allowed in its place."""
    width, past = len(tokenizer.get_vocab()) + 8, 0
    for token in (token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)):
        if constraint(mx.array([past]), mx.zeros((1, width)))[0, token].item() != 0:
            return False
        past = token
    return True


class Writer:
    """Writes calls of a function ``f`` as the model of a tokenizer does.

    Args:
        tokenizer (TokenizerWrapper): A tokenizer; its parser decides the format of calls.
        vocabulary (LLTokenizer): llguidance's tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: Any):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.is_xml = format_of(tokenizer) == "qwen3_coder"

    def call(self, name: str = "f", /, **arguments: str) -> str:
        """Return what stands between the tags of a call. The arguments are JSON."""
        if not self.is_xml:
            values = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items())
            body = f'{{"name": {json.dumps(name)}, "arguments": {{{values}}}}}'
            return "\n" + body.replace("</tool_call>", "\\u003c/tool_call>") + "\n"
        values = ""
        for key, value in arguments.items():
            text = escape(json.loads(value)) if value.startswith('"') else value.replace("</tool", "\\u003c/tool")
            values += f"<parameter={key}>\n{text}\n</parameter>\n"
        return f"\n<function={name}>\n{values}</function>\n"

    def fits(self, tools: Sequence[dict[str, Any]], call: str, warnings: Sequence[str] = ()) -> bool:
        """Say whether a call can be written."""
        constraint = constrained(self._tokenizer, tools=tools, tool_choice="required", vocabulary=self._vocabulary)
        # Tags inside a call are spelled in ordinary tokens.
        texts = [
            self._tokenizer.tool_call_start,
            *re.split(r"(<)(?=/?(?:tool_call|think)>)", call),
            self._tokenizer.tool_call_end,
        ]
        found = fits(constraint, self._tokenizer, *texts)
        assert constraint.warnings == list(warnings)
        return found

    def takes(self, schema: Any, value: str) -> bool:
        """Say whether a value, as JSON, fits a schema by the constraint; it must come back as it was written."""
        tools, call = parameter(schema), self.call(x=value)
        found = self.fits(tools, call)
        (read,) = read_calls(self._tokenizer, call, tools)
        if value.startswith('"'):
            assert json.loads(read.arguments) == {"x": json.loads(value)}
        else:
            assert read.arguments == f'{{"x": {value}}}'
        return found
