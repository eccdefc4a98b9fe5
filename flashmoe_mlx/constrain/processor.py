"""Logits processors for mlx-lm under which tool calls and JSON always parse and fit their schema.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

llguidance computes which tokens may come next; a small table turns its bit mask into an array of biases, on any device.
Parse the calls with ``tokenizer.tool_parser(text, readable(tools))``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import llguidance
import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np

from flashmoe_mlx.constrain.json_calls import json_calls, json_value
from flashmoe_mlx.constrain.lark import quote
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import xml_calls

Processor = Callable[[mx.array, mx.array], mx.array]
"""Returns new logits, from the tokens so far and their logits."""

# [256, 8]: the biases of eight tokens, for each byte of a mask.
_BIASES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_BIASES = _BIASES.astype(np.float32)


def constrained(
    tokenizer: Any,
    *,
    tools: Sequence[Schema],
    tool_choice: str | Schema = "auto",
    thinking: bool = False,
    vocabulary: Any = None,
) -> Processor:
    """Return a processor that leaves text alone until the model opens a tool call, and then allows only a valid call.

    All calls of an answer are constrained. Thoughts are not, even if they mention calls; but where a call must follow,
    the answer cannot end in a thought. A processor is for one answer.

    Args:
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer. Its tool parser determines the format of calls.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form.
        tool_choice (str or dict): ``"auto"``; ``"required"``, the answer begins with a call; or a named function,
            ``{"type": "function", "function": {"name": ...}}``, the answer begins with a call of it, and has no other
            calls. For ``"none"``, use no processor, and leave the tools out of the prompt.
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
    markers = _Markers.of(tokenizer, tokenizer.tool_call_start)
    return _GrammarProcessor(
        vocabulary, markers, first=first, calls=grammars, thinking=thinking, ends=tokenizer.eos_token_ids
    )


def json(tokenizer: Any, schema: Schema, *, thinking: bool = False, vocabulary: Any = None) -> Processor:
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
    return _GrammarProcessor(
        vocabulary, _Markers.of(tokenizer), first=[grammar], thinking=thinking, ends=tokenizer.eos_token_ids
    )


def can_constrain_calls(tokenizer: Any) -> bool:
    """Say whether a model's tool calls can be constrained: in Qwen's XML style or Hermes' JSON style."""
    return _format(tokenizer) in ("json_tools", "qwen3_coder")


def vocabulary_of(tokenizer: Any) -> Any:
    """Return the tokenizer as llguidance needs it. Reuse it: a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


@dataclass(frozen=True)
class _Markers:
    """Texts that start and end thoughts, and that open a call, in UTF-8. Empty if the model has no such marker."""

    thought: bytes
    thought_end: bytes
    call: bytes

    @classmethod
    def of(cls, tokenizer: Any, call: str = "") -> Self:
        thought = [tokenizer.think_start, tokenizer.think_end] if tokenizer.has_thinking else ["", ""]
        return cls(*(marker.encode() for marker in (*thought, call)))


class _GrammarProcessor:
    """Allows any token up to a marker, then only those of all grammars, then any token again.

    Args:
        vocabulary (LLTokenizer): llguidance's tokenizer.
        markers (_Markers): The model's markers.
        first (Sequence[str], optional): Grammars that the answer begins with, after its first thought.
        calls (Sequence[str], optional): Grammars of a call, from its opening tag on. Without them, the first grammars
            hold to the end of the answer.
        thinking (bool): The prompt ends inside a thought.
        ends (Collection[int]): Tokens that end the answer.

    Raises:
        ValueError: A grammar is not supported.
    """

    def __init__(
        self,
        vocabulary: Any,
        markers: _Markers,
        *,
        first: Sequence[str] | None,
        calls: Sequence[str] | None = None,
        thinking: bool,
        ends: Collection[int],
    ):
        for grammar in [*(first or ()), *(calls or ())]:
            if message := llguidance.LLMatcher.validate_grammar(grammar, vocabulary):
                raise ValueError(f"the schema is not supported: {message.splitlines()[0]}")
        self._vocabulary, self._markers = vocabulary, markers
        self._first, self._calls = first, calls
        self._thinking = thinking
        self._ends = mx.array(list(ends))
        self._longest = max(map(len, (markers.thought, markers.thought_end, markers.call)))
        # The end of the text, where a marker may have begun.
        self._tail = b""
        self._matchers: list[Any] = []
        self._prompt_is_over = False
        if not thinking:
            self._begin_first()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Add the biases of the next token to its logits. To be called after each token.

        Args:
            tokens (array): The tokens so far, ``[length]``.
            logits (array): The logits, ``[1, vocabulary]``.
        """
        # The tokens of the first call are the prompt's.
        if self._prompt_is_over:
            self._advance(tokens[-1].item())
        self._prompt_is_over = True
        if self._matchers:
            return logits + self._bias(logits.shape[-1]).astype(logits.dtype)
        # The answer cannot end in a thought that something must follow.
        if self._thinking and self._first is not None:
            logits[..., self._ends] = -mx.inf
        return logits

    def _bias(self, width: int) -> mx.array:
        masks = llguidance.numpy.allocate_token_bitmask(len(self._matchers), self._vocabulary.vocab_size)
        for row, matcher in enumerate(self._matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, masks, row)
        mask = np.bitwise_and.reduce(masks)
        if not mask.any():
            raise RuntimeError("the constraint failed: no token fits the schema here")
        # The logits may be wider than the vocabulary.
        bias = np.full(width, -np.inf, np.float32)
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
                    raise RuntimeError(f"the constraint failed: {matcher.get_error().splitlines()[0]}")
            if self._calls is not None and self._matchers[0].is_accepting():
                self._matchers = []
            return
        self._tail += self._vocabulary.decode_bytes([token])
        while self._pass_marker():
            pass
        self._tail = self._tail[-self._longest :]

    def _pass_marker(self) -> bool:
        """Act on the first marker in the tail, and say whether there may be another after it."""
        markers = [self._markers.thought_end] if self._thinking else [self._markers.thought, self._markers.call]
        found = [(self._tail.index(marker), marker) for marker in markers if marker and marker in self._tail]
        if not found:
            return False
        start, marker = min(found)
        rest, self._tail = self._tail[start + len(marker) :], b""
        if marker == self._markers.call:
            self._begin(self._calls or [])
        else:
            self._thinking = marker == self._markers.thought
            if not self._thinking:
                self._begin_first()
        # A marker spelled in ordinary tokens may end within one.
        if self._matchers and rest:
            tokens = self._vocabulary.tokenize_bytes(rest)
            if any(matcher.try_consume_tokens(tokens) < len(tokens) for matcher in self._matchers):
                self._matchers = []
            return False
        self._tail = rest
        return bool(rest)


def _format(tokenizer: Any) -> str:
    """Return the format of calls: the name of mlx-lm's parser."""
    return str(getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2])


def _tag(text: str, tokenizer: Any, vocabulary: Any) -> str:
    """Return a tag as a term of the grammar: for llguidance, a special token is not the same as its text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 and vocabulary.is_special_token(tokens[0]) else quote(text)
