"""Tool calls and JSON that always parse and fit their schema: logits processors for mlx-lm.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

llguidance says which tokens may come next; a small table of biases turns its bit mask into an array, on any device.
"""

import json as jsonlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import llguidance
import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np

Schema = Mapping[str, Any]
Processor = Callable[[mx.array, mx.array], mx.array]

_FORMATS: dict[str, Literal["json", "xml"]] = {"json_tools": "json", "qwen3_coder": "xml"}  # by mlx-lm's parser
_TEXT_RULES = {"pattern", "format", "minLength", "maxLength"}  # a string between tags cannot be held to these yet


def constrained(
    tokenizer: Any, *, tools: Sequence[Schema], tool_choice: str | Schema = "auto", vocabulary: Any = None
) -> Processor:
    """A processor that leaves text alone until the model opens a tool call, and then allows only a valid call.

    Parameters of Qwen's XML-style calls come in the order of the schema.

    Args:
        tokenizer: mlx-lm's; its chat template decides the format of calls.
        tools: the functions offered, as in OpenAI's API.
        tool_choice: ``"auto"``, or a named function, ``{"type": "function", "function": {"name": …}}``, which any
            call must then be to. A call is not forced yet.
        vocabulary: what :func:`vocabulary_of` returned, to use it again. Default: made here, which takes a second.

    Raises:
        ValueError: no format known for this tokenizer, no such tool, or a schema that is not supported.
    """
    parser = getattr(tokenizer, "tool_parser", None)
    kind = _FORMATS.get(getattr(parser, "__module__", "").rpartition(".")[2])
    if kind is None:
        raise ValueError("Constrained tool calls know Qwen's XML-style and Hermes' JSON-style calls, not this model's.")
    if isinstance(tool_choice, Mapping):
        name = tool_choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ValueError(f"tool_choice: no tool is called {name!r}.")
    elif tool_choice != "auto":
        raise ValueError(f"tool_choice {tool_choice!r} is not supported.")
    grammar = _calls_grammar(tokenizer, [tool["function"] for tool in tools], kind)
    opener = tokenizer.encode(tokenizer.tool_call_start, add_special_tokens=False)
    return _Constrain(grammar, vocabulary or vocabulary_of(tokenizer), opener)


def json(tokenizer: Any, schema: Schema, *, thinking: bool = False, vocabulary: Any = None) -> Processor:
    """A processor that allows only JSON that fits a schema, from the first token on.

    Args:
        schema: a JSON schema; ``{"type": "object"}`` is any object.
        thinking: begin after ``</think>`` instead.

    Raises:
        ValueError: the schema is not supported, or ``thinking`` and the model does not think.
    """
    opener: list[int] = []
    if thinking:
        if not tokenizer.has_thinking:
            raise ValueError("thinking: this model does not think.")
        opener = tokenizer.encode(tokenizer.think_end, add_special_tokens=False)
    grammar = f"start: {'SPACE? ' if thinking else ''}json\njson: {_json(schema)}\nSPACE: /[\\n ]{{1,4}}/\n"
    return _Constrain(grammar, vocabulary or vocabulary_of(tokenizer), opener, last=True)


def vocabulary_of(tokenizer: Any) -> Any:
    """The tokenizer as llguidance needs it. Keep it: building one for a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


class _Constrain:
    """Free tokens until the opener, then only the grammar's, then free again unless the grammar comes last."""

    def __init__(self, grammar: str, vocabulary: Any, opener: Sequence[int], last: bool = False):
        message = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
        if message:
            raise ValueError(f"The schema is not supported: {message.splitlines()[0]}")
        self._grammar, self._vocabulary = grammar, vocabulary
        self._opener, self._last = list(opener), last
        self._matcher = None if opener else self._begin()
        self._recent: list[int] = []
        self._prompt_is_over = False
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary.vocab_size)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._prompt_is_over:  # the first call brings the prompt's tokens
            self._advance(int(tokens[-1].item()))
        self._prompt_is_over = True
        if self._matcher is None:
            return logits
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.shape[-1]]
        bias = np.full(logits.shape[-1], -np.inf, np.float32)  # also where the logits are wider than the vocabulary
        bias[: allowed.size][allowed == 1] = 0
        return logits + mx.array(bias).astype(logits.dtype)

    def _begin(self) -> Any:
        return llguidance.LLMatcher(self._vocabulary, self._grammar)

    def _advance(self, token: int) -> None:
        if self._matcher is not None:
            self._matcher.consume_token(token)
            if self._matcher.is_error():
                raise RuntimeError(f"The constraint failed: {self._matcher.get_error()}")
            if not self._last and self._matcher.is_accepting():
                self._matcher = None
            return
        self._recent = [*self._recent, token][-len(self._opener) :]
        if self._recent == self._opener:
            self._matcher, self._recent = self._begin(), []


def _calls_grammar(tokenizer: Any, functions: Sequence[Schema], kind: str) -> str:
    """What follows the opening tag, in llguidance's dialect of Lark."""
    closer = tokenizer.encode(tokenizer.tool_call_end, add_special_tokens=False)
    end = f"<[{closer[0]}]>" if len(closer) == 1 else _quote(tokenizer.tool_call_end)
    rules: list[str] = []
    for index, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if kind == "json":
            call = {"name": {"const": function["name"]}, "arguments": schema}
            whole = {"type": "object", "properties": call, "required": ["name", "arguments"]}
            whole |= {"additionalProperties": False} | _definitions(schema)
            rules.append(f'call_{index}: "\\n" {_json(whole)} "\\n"')
        else:
            rules += _xml_rules(index, function["name"], schema)
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    return "\n".join([f"start: call {end}", f"call: {calls}", *rules]) + "\n"


def _xml_rules(index: int, name: str, schema: Schema) -> list[str]:
    """The rules of one function's calls in Qwen's XML style."""
    parts, rules = [], []
    for number, (key, value) in enumerate(schema.get("properties", {}).items()):
        rule = f"value_{index}_{number}"
        parts.append(f"parameter_{index}_{number}" + ("" if key in schema.get("required", ()) else "?"))
        rules.append(f"parameter_{index}_{number}: {_quote(f'<parameter={key}>' + chr(10))} {rule}")
        rules.append(_xml_value(rule, name, key, {**value, **_definitions(schema)}))
    body = " ".join(parts)
    opening, closing = _quote(f"\n<function={name}>\n"), _quote("</function>\n")
    return [f"call_{index}: {opening} {body} {closing}", *rules]


def _xml_value(rule: str, function: str, key: str, schema: Schema) -> str:
    """The rule of one value and its closing tag: plain text for strings, JSON for everything else."""
    closer = "\n</parameter>\n"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        texts = [choice if isinstance(choice, str) else jsonlib.dumps(choice) for choice in choices]
        return f"{rule}: ({' | '.join(map(_quote, texts))}) {_quote(closer)}"
    if schema.get("type", "string") == "string" and not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}:
        if unsupported := sorted(schema.keys() & _TEXT_RULES):
            raise ValueError(f"{function}.{key}: {unsupported[0]} is not supported for a string in this model's calls.")
        return f"{rule}[suffix={_quote(closer)}]: /(?s:.*)/"
    return f"{rule}: {_json(schema)} {_quote(closer)}"


def _definitions(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _json(schema: Schema) -> str:
    """JSON that fits the schema, at most one space after a comma or colon: a weak model could fill a file with them."""
    spacing = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return "%json " + jsonlib.dumps({**schema, "x-guidance": spacing})


def _quote(text: str) -> str:
    return jsonlib.dumps(text)
