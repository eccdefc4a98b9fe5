"""Logits processors for mlx-lm under which tool calls and JSON always parse and fit their schema.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

Read the calls with :func:`read_calls`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import llguidance.hf
import mlx.core as mx

from flashmoe_mlx.constrain.cleaning import clean
from flashmoe_mlx.constrain.constraint import Constraint, Markers
from flashmoe_mlx.constrain.function import Function, functions_of, variants_of
from flashmoe_mlx.constrain.json_calls import json_calls
from flashmoe_mlx.constrain.lark import quote
from flashmoe_mlx.constrain.reading import format_of
from flashmoe_mlx.constrain.schema import Schema, fault_of, json_value
from flashmoe_mlx.constrain.weakening import weaken
from flashmoe_mlx.constrain.xml_calls import is_writable, xml_calls, xml_warnings

_LOG = logging.getLogger(__name__)

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

    All calls of an answer are constrained, as far as a grammar can hold their schemas; the constraint's ``warnings``
    say what is left free. Thoughts are not, even if they mention calls; but where a call must follow,
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
        ValueError: The model's format of calls is unknown, a tool is missing, parameters are no schema at all, or the
            schema of a ``strict`` function cannot be enforced.
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
    functions, end = functions_of(tools), tokenizer.tool_call_end
    closing = _tag(end, tokenizer, vocabulary)
    is_xml = format_of(tokenizer) == "qwen3_coder"
    warnings = []
    for function in functions:
        found = [*function.warnings, *(xml_warnings(function) if is_xml else ())]
        _report(found, function.is_strict)
        warnings += found
    if is_xml:
        functions = [function for function in functions if is_writable(function)]
        if not functions:
            raise ValueError("no tool has a name that can be written in this model's calls")
    calls = partial(xml_calls if is_xml else json_calls, end=end)
    opening = _tag(tokenizer.tool_call_start, tokenizer, vocabulary)
    before = ("/[ \\n]{0,4}/ " if thinking else "") + opening

    def constraint() -> Constraint:
        grammars = calls(functions, closing=closing)
        first = [grammar.replace("start: ", f"start: {before} ", 1) for grammar in grammars]
        return Constraint(
            vocabulary,
            Markers.of(tokenizer, tokenizer.tool_call_start, end),
            first=None if tool_choice == "auto" else first,
            calls=grammars,
            one_call=isinstance(tool_choice, Mapping),
            thinking=thinking,
            ends=tokenizer.eos_token_ids,
            warnings=warnings,
        )

    try:
        return constraint()
    except ValueError:
        for index, function in enumerate(functions):
            if fault := next(filter(None, map(fault_of, calls([function], closing='"x"'))), None):
                warnings.append(f"{function.name}: the parameters are left free: {fault}")
                _report(warnings[-1:], function.is_strict)
                functions[index] = Function(function.name, {"type": "object"}, {}, warnings[-1:])
        return constraint()


def json(
    tokenizer: Any, schema: Schema, *, thinking: bool = False, strict: bool = False, vocabulary: Any = None
) -> Constraint:
    """Return a processor that allows only JSON that fits a schema, from the first token on.

    Args:
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer.
        schema (dict): A JSON schema; ``{"type": "object"}`` allows any object.
        thinking (bool): The prompt ends inside a thought. The JSON begins after it.
        strict (bool): Refuse a schema that cannot be enforced as a whole.
        vocabulary (LLTokenizer, optional): From :func:`vocabulary_of`. Default: made here, which takes a second.

    Raises:
        ValueError: The schema is no schema at all, or ``strict`` is true and it cannot be enforced, or ``thinking`` is
            true for a model that does not think.
    """
    if thinking and not tokenizer.has_thinking:
        raise ValueError("thinking is true, but this model does not think")
    cleaned = clean(schema, "response_format")
    weaken(cleaned, "response_format")
    _report(cleaned.warnings, strict)
    variants = variants_of([Function("response_format", cleaned.schema, cleaned.definitions)])
    values = [json_value(whole.schema, whole.definitions, any_escape=False) for (whole,) in variants]
    space = "SPACE? " if thinking else ""
    grammars = [f"start: {space}json\njson: {value}\nSPACE: /[\\n ]{{1,4}}/\n" for value in values]
    return Constraint(
        vocabulary or vocabulary_of(tokenizer),
        Markers.of(tokenizer),
        first=grammars,
        thinking=thinking,
        ends=tokenizer.eos_token_ids,
        warnings=cleaned.warnings,
    )


def can_constrain_calls(tokenizer: Any) -> bool:
    """Say whether a model's tool calls can be constrained: in Qwen's XML style or Hermes' JSON style."""
    return format_of(tokenizer) in ("json_tools", "qwen3_coder")


def vocabulary_of(tokenizer: Any) -> Any:
    """Return the tokenizer as llguidance needs it. Reuse it: a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


def _report(warnings: Sequence[str], strict: bool) -> None:
    if strict and warnings:
        raise ValueError(f"{warnings[0]}; strict allows no such rule: remove it, or strict")
    for warning in warnings:
        _log(warning)


@lru_cache(maxsize=1024)
def _log(warning: str) -> None:
    # Once a process, since clients send the same tools with each request.
    _LOG.warning("%s", warning)


def _tag(text: str, tokenizer: Any, vocabulary: Any) -> str:
    """Return a tag as a term of the grammar: for llguidance, a special token is not the same as its text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 and vocabulary.is_special_token(tokens[0]) else quote(text)
