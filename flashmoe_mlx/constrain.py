"""Tool calls and JSON that always parse and fit their schema: logits processors for mlx-lm.

    generate(model, tokenizer, prompt, logits_processors=[constrained(tokenizer, tools=tools)])

llguidance says which tokens may come next; its bit mask becomes an array, on any device.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np

from flashmoe_mlx import grammar
from flashmoe_mlx.grammar import Schema

Processor = Callable[[mx.array, mx.array], mx.array]

_GRAMMARS = {"json_tools": grammar.json_calls, "qwen3_coder": grammar.xml_calls}  # by mlx-lm's parser


def constrained(
    tokenizer: Any,
    *,
    tools: Sequence[Schema],
    tool_choice: str | Schema = "auto",
    thinking: bool = False,
    vocabulary: Any = None,
) -> Processor:
    """A processor that leaves text alone until the model opens a tool call, and then allows only a valid call.

    A call names one of the tools, has all parameters that are required and no unknown ones, and each value fits its
    schema. Numbers have no exponents. After a call text is free again, and there may be another call. A processor is
    for one answer; the first tokens that it is called with are the prompt's. To read the calls, give mlx-lm's parser
    :func:`flashmoe_mlx.grammar.readable` tools.

    Args:
        tokenizer: mlx-lm's; its chat template decides the format of calls.
        tools: the functions offered, as in OpenAI's API.
        tool_choice: ``"auto"``; ``"required"``, the answer begins with a call; or a named function,
            ``{"type": "function", "function": {"name": …}}``, it begins with a call to that one.
        thinking: the answer begins inside a thought, in which nothing is a call.
        vocabulary: what :func:`vocabulary_of` returned, to use it again. Default: made here, which takes a second.

    Raises:
        ValueError: no format known for this tokenizer, no such tool, or a schema that is not supported.
    """
    calls = _grammar(tokenizer)
    if calls is None:
        raise ValueError("Constrained tool calls know Qwen's XML-style and Hermes' JSON-style calls, not this model's.")
    functions = [tool["function"] for tool in tools]
    if isinstance(tool_choice, Mapping):
        name = tool_choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ValueError(f"tool_choice: no tool is called {name!r}.")
    elif tool_choice not in ("auto", "required"):
        raise ValueError(f"tool_choice {tool_choice!r} is not supported.")
    opener = tokenizer.encode(tokenizer.tool_call_start, add_special_tokens=False)
    closer = tokenizer.encode(tokenizer.tool_call_end, add_special_tokens=False)
    rules = calls(functions, _lark(closer, tokenizer.tool_call_end))
    first = f"start: SPACE? {_lark(opener, tokenizer.tool_call_start)} call\nSPACE: /[\\n ]{{1,4}}/\n{rules}"
    return _Constraint(
        vocabulary or vocabulary_of(tokenizer),
        first=None if tool_choice == "auto" else first,
        thought=_thought(tokenizer) if thinking else (),
        opener=opener,
        then=f"start: call\n{rules}",
    )


def json(tokenizer: Any, schema: Schema, *, thinking: bool = False, vocabulary: Any = None) -> Processor:
    """A processor that allows only JSON that fits a schema, from the first token on.

    Args:
        tokenizer: mlx-lm's.
        schema: a JSON schema; ``{"type": "object"}`` is any object.
        thinking: begin after ``</think>`` instead.
        vocabulary: see :func:`constrained`.

    Raises:
        ValueError: the schema is not supported, or ``thinking`` and the model does not think.
    """
    rules = f"start: {'SPACE? ' if thinking else ''}json\njson: {grammar.json_value(schema)}\nSPACE: /[\\n ]{{1,4}}/\n"
    return _Constraint(
        vocabulary or vocabulary_of(tokenizer), first=rules, thought=_thought(tokenizer) if thinking else ()
    )


def can_constrain_calls(tokenizer: Any) -> bool:
    """Whether the format of a model's tool calls is known here."""
    return _grammar(tokenizer) is not None


def vocabulary_of(tokenizer: Any) -> Any:
    """The tokenizer as llguidance needs it. Keep it: building one for a large vocabulary takes a second or two."""
    return llguidance.hf.from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


class _Constraint:
    """Free tokens until a thought ends, then a first grammar's if there is one, then free ones until an opener.

    What follows an opener is a grammar's again. Without an opener nothing may follow the first grammar but the end.
    """

    def __init__(
        self,
        vocabulary: Any,
        *,
        first: str | None,
        thought: Sequence[int] = (),
        opener: Sequence[int] = (),
        then: str = "",
    ):
        for each in (first, then):
            if each and (message := llguidance.LLMatcher.validate_grammar(each, vocabulary)):
                raise ValueError(f"The schema is not supported: {_reason(message)}")
        self._vocabulary = vocabulary
        self._first, self._then = first, then
        self._opener = list(opener)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary.vocab_size)
        self._matcher: Any = None
        self._awaited: list[int] = list(thought)
        self._in_thought = bool(thought)
        self._recent: list[int] = []
        self._prompt_is_over = False
        if not thought:
            self._begin_answer()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._prompt_is_over:  # the first call brings the prompt's tokens
            self._advance(int(tokens[-1]))
        self._prompt_is_over = True
        if self._matcher is None:
            return logits
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.shape[-1]]
        bias = np.full(logits.shape[-1], -np.inf, np.float32)  # also where the logits are wider than the vocabulary
        bias[: allowed.size][allowed == 1] = 0
        return logits + mx.array(bias).astype(logits.dtype)

    def _begin_answer(self) -> None:
        self._in_thought = False
        self._awaited = self._opener
        if self._first is not None:
            self._matcher = llguidance.LLMatcher(self._vocabulary, self._first)

    def _advance(self, token: int) -> None:
        if self._matcher is None:
            self._recent = [*self._recent, token][-len(self._awaited) :]
            if self._recent == self._awaited:
                self._recent = []
                if self._in_thought:
                    self._begin_answer()
                else:
                    self._matcher = llguidance.LLMatcher(self._vocabulary, self._then)
            return
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise RuntimeError(f"The constraint failed: {self._matcher.get_error()}")
        if self._opener and self._matcher.is_accepting():
            self._matcher = None


def _grammar(tokenizer: Any) -> Callable[[Sequence[Schema], str], str] | None:
    parser = getattr(tokenizer, "tool_parser", None)
    return _GRAMMARS.get(getattr(parser, "__module__", "").rpartition(".")[2])


def _thought(tokenizer: Any) -> list[int]:
    if not tokenizer.has_thinking:
        raise ValueError("thinking: this model does not think.")
    tokens: list[int] = tokenizer.encode(tokenizer.think_end, add_special_tokens=False)
    return tokens


def _lark(tokens: Sequence[int], text: str) -> str:
    """A mark: the token that it is, or else its text."""
    return f"<[{tokens[0]}]>" if len(tokens) == 1 else grammar.quoted(text)


def _reason(message: str) -> str:
    """llguidance's first line, without the place in a grammar that nobody has seen."""
    return re.sub(r"^at [\d()]+: (failed to compile JSON schema: )?", "", message.splitlines()[0]).rstrip(":")
