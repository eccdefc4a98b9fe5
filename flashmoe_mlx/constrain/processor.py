"""Logits processors for mlx-lm under which tool calls and JSON always parse and fit their schema.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

Parse the calls with ``tokenizer.tool_parser(text, readable(tools))``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance.hf
import mlx.core as mx

from flashmoe_mlx.constrain.constraint import Constraint, Markers
from flashmoe_mlx.constrain.json_calls import json_calls, json_value
from flashmoe_mlx.constrain.lark import quote
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import xml_calls

Processor = Callable[[mx.array, mx.array], mx.array]
"""Returns new logits, from the tokens so far and their logits."""


def constrained(
    tokenizer: Any,
    *,
    tools: Sequence[Schema],
    tool_choice: str | Schema = "auto",
    thinking: bool = False,
    vocabulary: Any = None,
) -> Constraint:
    """Return a processor that leaves text alone until the model opens a tool call, and then allows only a valid call.

    All calls of an answer are constrained. Thoughts are not, even if they mention calls; but where a call must follow,
    the answer cannot end in a thought. A processor is for one answer.

    Args:
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer. Its tool parser determines the format of calls.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.
        tool_choice (str or dict): ``"auto"``; ``"required"``, the answer begins with a call; or a named function,
            ``{"type": "function", "function": {"name": ...}}``, the answer is one call of it. For
            ``"none"``, use no processor, and leave the tools out of the prompt.
        thinking (bool): The prompt ends inside a thought. The answer begins after it.
        vocabulary (LLTokenizer, optional): From :func:`vocabulary_of`. Default: made here, which takes a second.

    Raises:
        ValueError: The model's format of calls is unknown, a tool is missing, or a schema is not supported.
    """
    vocabulary = vocabulary or vocabulary_of(tokenizer)
    if not can_constrain_calls(tokenizer):
        raise ValueError("this model's tool calls cannot be constrained: only those in the style of Qwen or Hermes can")
    if isinstance(tool_choice, Mapping):
        name = tool_choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ValueError(f"tool_choice: there is no tool {name!r}")
    elif tool_choice not in ("auto", "required"):
        raise ValueError(f'tool_choice is {tool_choice!r}: it must be "auto", "required" or a named function')
    functions, end = [tool["function"] for tool in tools], tokenizer.tool_call_end
    closing = _tag(end, tokenizer, vocabulary)
    if _format(tokenizer) == "json_tools":
        grammars = json_calls(functions, end, closing)
    else:
        grammars = xml_calls(functions, end, closing, tokenizer.tool_parser)
    first = None
    if tool_choice != "auto":
        opening = _tag(tokenizer.tool_call_start, tokenizer, vocabulary)
        space = "/[ \\n]{0,4}/ " if thinking else ""
        first = [grammar.replace("start: ", f"start: {space}{opening} ", 1) for grammar in grammars]
    return Constraint(
        vocabulary,
        Markers.of(tokenizer, tokenizer.tool_call_start, end),
        first=first,
        calls=grammars,
        one_call=isinstance(tool_choice, Mapping),
        thinking=thinking,
        ends=tokenizer.eos_token_ids,
    )


def json(tokenizer: Any, schema: Schema, *, thinking: bool = False, vocabulary: Any = None) -> Constraint:
    """Return a processor that allows only JSON that fits a schema, from the first token on.

    Args:
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer.
        schema (dict): A JSON schema; ``{"type": "object"}`` allows any object.
        thinking (bool): The prompt ends inside a thought. The JSON begins after it.
        vocabulary (LLTokenizer, optional): From :func:`vocabulary_of`. Default: made here, which takes a second.

    Raises:
        ValueError: The schema is not supported, or ``thinking`` is true for a model that does not think.
    """
    if thinking and not tokenizer.has_thinking:
        raise ValueError("thinking is true, but this model does not think")
    grammar = f"start: {'SPACE? ' if thinking else ''}json\njson: {json_value(schema)}\nSPACE: /[\\n ]{{1,4}}/\n"
    vocabulary = vocabulary or vocabulary_of(tokenizer)
    return Constraint(
        vocabulary, Markers.of(tokenizer), first=[grammar], thinking=thinking, ends=tokenizer.eos_token_ids
    )


def can_constrain_calls(tokenizer: Any) -> bool:
    """Say whether a model's tool calls can be constrained: in Qwen's XML style or Hermes' JSON style."""
    return _format(tokenizer) in ("json_tools", "qwen3_coder")


def vocabulary_of(tokenizer: Any) -> Any:
    """Return the tokenizer as llguidance needs it. Reuse it: a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


def _format(tokenizer: Any) -> str:
    """Return the format of calls: the name of mlx-lm's parser."""
    return str(getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2])


def _tag(text: str, tokenizer: Any, vocabulary: Any) -> str:
    """Return a tag as a term of the grammar: for llguidance, a special token is not the same as its text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 and vocabulary.is_special_token(tokens[0]) else quote(text)
