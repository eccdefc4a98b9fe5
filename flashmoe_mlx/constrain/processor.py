"""Tool calls and JSON that always parse and fit their schema: logits processors for mlx-lm.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

llguidance says which tokens may come next; a small table of biases turns its bit mask into an array, on any device.
Read the calls with ``tokenizer.tool_parser(text, readable(tools))``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np

from flashmoe_mlx.constrain.json_calls import json_calls, json_value, quote
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import readable, xml_calls

__all__ = ["Processor", "Schema", "constrained", "json", "readable", "vocabulary_of"]

Processor = Callable[[mx.array, mx.array], mx.array]

_BIASES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_BIASES = _BIASES.astype(np.float32)  # [256, 8]: of the eight tokens of each byte of a mask


def constrained(
    tokenizer: Any,
    *,
    tools: Sequence[Schema],
    tool_choice: str | Schema = "auto",
    thinking: bool = False,
    vocabulary: Any = None,
) -> Processor:
    """A processor that leaves text alone until the model opens a tool call, and then allows only a valid call.

    Each call of several is held to it. Thoughts are free, also to speak of calls, but where a call must follow the
    answer cannot end in one. A processor is for one answer.

    Args:
        tokenizer: mlx-lm's; its chat template decides the format of calls.
        tools: the functions offered, as in OpenAI's API.
        tool_choice: ``"auto"``; ``"required"``, a call must come first; or a named function, ``{"type": "function",
            "function": {"name": …}}``, which must be called first, and alone. For ``"none"``, use no processor, and
            leave the tools out of the prompt.
        thinking: the prompt ends inside a thought, and what comes first comes after it.
        vocabulary: what :func:`vocabulary_of` returned, to use it again. Default: made here, which takes a second.

    Raises:
        ValueError: no format known for this tokenizer, no such tool, or a schema that is not supported.
    """
    vocabulary = vocabulary or vocabulary_of(tokenizer)
    if not can_constrain_calls(tokenizer):
        raise ValueError("Constrained tool calls know Qwen's XML-style and Hermes' JSON-style calls, not this model's.")
    if isinstance(tool_choice, Mapping):
        name = tool_choice["function"]["name"]
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ValueError(f"tool_choice: no tool is called {name!r}.")
    elif tool_choice not in ("auto", "required"):
        raise ValueError(f'tool_choice is {tool_choice!r}: "auto", "required" or a named function can be held to.')
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
    marks = _Marks.of(tokenizer, tokenizer.tool_call_start)
    return _Constrain(vocabulary, marks, first=first, calls=grammars, thinking=thinking, ends=tokenizer.eos_token_ids)


def json(tokenizer: Any, schema: Schema, *, thinking: bool = False, vocabulary: Any = None) -> Processor:
    """A processor that allows only JSON that fits a schema, from the first token on.

    Args:
        schema: a JSON schema; ``{"type": "object"}`` is any object.
        thinking: begin after ``</think>`` instead.

    Raises:
        ValueError: the schema is not supported, or ``thinking`` and the model does not think.
    """
    if thinking and not tokenizer.has_thinking:
        raise ValueError("thinking: this model does not think.")
    grammar = f"start: {'SPACE? ' if thinking else ''}json\njson: {json_value(schema)}\nSPACE: /[\\n ]{{1,4}}/\n"
    vocabulary = vocabulary or vocabulary_of(tokenizer)
    return _Constrain(
        vocabulary, _Marks.of(tokenizer), first=[grammar], thinking=thinking, ends=tokenizer.eos_token_ids
    )


def can_constrain_calls(tokenizer: Any) -> bool:
    """Whether the format of a model's tool calls is known here: Qwen's in XML style, or Hermes' in JSON."""
    return _format(tokenizer) in ("json_tools", "qwen3_coder")


def vocabulary_of(tokenizer: Any) -> Any:
    """The tokenizer as llguidance needs it. Keep it: building one for a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


@dataclass(frozen=True)
class _Marks:
    """What begins and ends thoughts, and what opens a call, in UTF-8; empty if there is no such mark."""

    thought: bytes
    thought_end: bytes
    call: bytes

    @classmethod
    def of(cls, tokenizer: Any, call: str = "") -> "_Marks":
        thought = [tokenizer.think_start, tokenizer.think_end] if tokenizer.has_thinking else ["", ""]
        return cls(*(mark.encode() for mark in (*thought, call)))


class _Constrain:
    """Free tokens until a mark, then only those of all grammars, then free again; without calls, to the end."""

    def __init__(
        self,
        vocabulary: Any,
        marks: _Marks,
        *,
        first: Sequence[str] | None,
        calls: Sequence[str] | None = None,
        thinking: bool,
        ends: Collection[int],
    ):
        for grammar in [*(first or ()), *(calls or ())]:
            if message := llguidance.LLMatcher.validate_grammar(grammar, vocabulary):
                raise ValueError(f"The schema is not supported: {message.splitlines()[0]}")
        self._vocabulary, self._marks = vocabulary, marks
        self._first, self._calls = first, calls
        self._thinking = thinking
        self._ends = mx.array(list(ends))
        self._longest = max(map(len, (marks.thought, marks.thought_end, marks.call)))
        self._tail = b""  # of the text: a mark may have been begun
        self._matchers: list[Any] = []
        self._prompt_is_over = False
        if not thinking:
            self._begin_first()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Bias the logits, [1, vocabulary], of what follows the tokens, [length]: it is told of each new one."""
        if self._prompt_is_over:  # the first call brings the prompt's tokens
            self._advance(tokens[-1].item())
        self._prompt_is_over = True
        if self._matchers:
            return logits + self._bias(logits.shape[-1]).astype(logits.dtype)
        if self._thinking and self._first is not None:  # something must follow the thought
            logits[..., self._ends] = -mx.inf
        return logits

    def _bias(self, width: int) -> mx.array:
        masks = llguidance.numpy.allocate_token_bitmask(len(self._matchers), self._vocabulary.vocab_size)
        for row, matcher in enumerate(self._matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, masks, row)
        mask = np.bitwise_and.reduce(masks)
        if not mask.any():
            raise RuntimeError("The constraint failed: no token fits the schema here.")
        bias = np.full(width, -np.inf, np.float32)  # the logits may be wider than the vocabulary
        allowed = _BIASES[mask.view(np.uint8)].ravel()[:width]
        bias[: allowed.size] = allowed
        return mx.array(bias)

    def _begin(self, grammars: Sequence[str]) -> None:
        self._matchers = [llguidance.LLMatcher(self._vocabulary, grammar, log_level=0) for grammar in grammars]

    def _begin_first(self) -> None:
        if self._first is not None:
            self._begin(self._first)
        self._first = None

    def _advance(self, token: Any) -> None:
        if self._matchers:
            for matcher in self._matchers:
                if not matcher.consume_token(token):
                    raise RuntimeError(f"The constraint failed: {matcher.get_error().splitlines()[0]}")
            if self._calls is not None and self._matchers[0].is_accepting():
                self._matchers = []
            return
        self._tail += self._vocabulary.decode_bytes([token])
        while self._meet_mark():
            pass
        self._tail = self._tail[-self._longest :]

    def _meet_mark(self) -> bool:
        """Whether there was a mark in the text, which is behind it now."""
        marks = [self._marks.thought_end] if self._thinking else [self._marks.thought, self._marks.call]
        found = [(self._tail.index(mark), mark) for mark in marks if mark and mark in self._tail]
        if not found:
            return False
        start, mark = min(found)
        rest, self._tail = self._tail[start + len(mark) :], b""
        if mark == self._marks.call:
            self._begin(self._calls or [])
        else:
            self._thinking = mark == self._marks.thought
            if not self._thinking:
                self._begin_first()
        # A mark spelled in ordinary tokens may end within one.
        if self._matchers and rest:
            tokens = self._vocabulary.tokenize_bytes(rest)
            if any(matcher.try_consume_tokens(tokens) < len(tokens) for matcher in self._matchers):
                self._matchers = []
            return False
        self._tail = rest
        return bool(rest)


def _format(tokenizer: Any) -> str:
    """That of calls: the name of mlx-lm's parser for it."""
    return str(getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2])


def _tag(text: str, tokenizer: Any, vocabulary: Any) -> str:
    """A tag in the grammar: llguidance tells special tokens from the same text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 and vocabulary.is_special_token(tokens[0]) else quote(text)
