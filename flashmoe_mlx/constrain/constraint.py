"""A logits processor that holds an answer to grammars.

llguidance computes which tokens may come next; a small table turns its bit mask into an array of biases, on any device.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import llguidance
import llguidance.numpy
import mlx.core as mx
import numpy as np

from flashmoe_mlx.constrain.digits import DigitRun

# A text of 250,000 characters under a bound has as many states; each takes about 700 bytes, while it is written.
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=1_000_000, initial_lexer_fuel=50_000_000, step_lexer_fuel=20_000_000
)

_LOG = logging.getLogger(__name__)

# [256, 8]: the biases of eight tokens, for each byte of a mask.
_BIASES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_BIASES = _BIASES.astype(np.float32)


@dataclass(frozen=True)
class Markers:
    """Texts that start and end thoughts and calls, in UTF-8. Empty if the model has no such marker."""

    thought: bytes
    thought_end: bytes
    call: bytes
    call_end: bytes

    @classmethod
    def of(cls, tokenizer: Any, call: str = "", call_end: str = "") -> Self:
        """Return the markers of a tokenizer's thoughts, and those of calls."""
        thought = [tokenizer.think_start, tokenizer.think_end] if tokenizer.has_thinking else ["", ""]
        return cls(*(marker.encode() for marker in (*thought, call, call_end)))


class Constraint:
    """Allows any token up to a marker, then only those of all grammars, then any token again.

    Where llguidance cannot follow a grammar any more, or no token fits all grammars, the constraint is released: the
    model writes freely to the end of the call, and ``warnings`` says so.

    Args:
        vocabulary (LLTokenizer): llguidance's tokenizer.
        markers (Markers): The model's markers.
        first (Sequence[str], optional): Grammars that the answer begins with, after its first thought.
        calls (Sequence[str], optional): Grammars of a call, from its opening tag on. Without them, the first grammars
            hold to the end of the answer.
        one_call (bool): The answer ends after its first call.
        thinking (bool): The prompt ends inside a thought.
        ends (Collection[int]): Tokens that end the answer.
        warnings (Sequence[str]): What the grammars do not hold.

    Attributes:
        warnings (list[str]): What is not held, one line each. It grows while the answer is written.

    Raises:
        ValueError: A grammar is not supported.
    """

    def __init__(
        self,
        vocabulary: Any,
        markers: Markers,
        *,
        first: Sequence[str] | None,
        calls: Sequence[str] | None = None,
        one_call: bool = False,
        thinking: bool,
        ends: Collection[int],
        warnings: Sequence[str] = (),
    ):
        for grammar in [*(first or ()), *(calls or ())]:
            if message := llguidance.LLMatcher.validate_grammar(grammar, vocabulary):
                raise ValueError(f"the schema is not supported: {message.splitlines()[0]}")
        self.warnings = list(warnings)
        self._vocabulary, self._markers = vocabulary, markers
        self._first, self._calls, self._one_call = first, calls, one_call
        self._thinking = thinking
        self._ends = mx.array(list(ends))
        self._longest = max(map(len, (markers.thought, markers.thought_end, markers.call, markers.call_end)))
        # The end of the text, where a marker may have begun.
        self._tail = b""
        self._matchers: list[Any] = []
        self._digits = DigitRun(vocabulary)
        self._released_call = False
        self._answer_is_over = False
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
        if self._answer_is_over:
            allowed = mx.full(logits.shape, -mx.inf, logits.dtype)
            allowed[..., self._ends] = logits[..., self._ends]
            return allowed
        if self._matchers and (mask := self._mask()) is not None:
            return logits + _bias(mask, logits.shape[-1]).astype(logits.dtype)
        # The answer cannot end in a thought that something must follow.
        if self._thinking and self._first is not None:
            logits[..., self._ends] = -mx.inf
        return logits

    def _mask(self) -> np.ndarray | None:
        """Return the bits of the tokens that fit all grammars; ``None`` if the constraint had to be released."""
        masks = llguidance.numpy.allocate_token_bitmask(len(self._matchers), self._vocabulary.vocab_size)
        for row, matcher in enumerate(self._matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, masks, row)
            # A matcher that failed allows the end of the answer, as if the answer were whole.
            if matcher.is_error():
                self._release(matcher.get_error())
                return None
        mask: np.ndarray = np.bitwise_and.reduce(masks)
        if mask.any():
            return self._digits.limit(mask)
        self._release("no token fits the schema here")
        return None

    def _release(self, reason: str) -> None:
        what = "an answer" if self._calls is None else "a call"
        reason = (reason.splitlines() or ["unknown"])[0]
        self.warnings.append(f"{what} was not held to its schema to the end: {reason}")
        _LOG.warning("%s", self.warnings[-1])
        self._matchers, self._tail = [], b""
        self._released_call = self._calls is not None

    def _begin(self, grammars: Sequence[str]) -> None:
        self._matchers = [
            llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=_LIMITS) for grammar in grammars
        ]

    def _begin_first(self) -> None:
        if self._first is not None:
            self._begin(self._first)
        self._first = None

    def _end_call(self) -> None:
        self._matchers, self._released_call = [], False
        self._answer_is_over = self._one_call

    def _advance(self, token: Any) -> None:
        if self._matchers:
            self._digits.add(token)
            for matcher in self._matchers:
                if not matcher.consume_token(token):
                    self._release(matcher.get_error())
                    return
            if self._calls is not None and all(matcher.is_accepting() for matcher in self._matchers):
                self._end_call()
            return
        self._tail += self._vocabulary.decode_bytes([token])
        while self._pass_marker():
            pass
        self._tail = self._tail[-self._longest :]

    def _next_markers(self) -> list[bytes]:
        if self._released_call:
            return [self._markers.call_end]
        return [self._markers.thought_end] if self._thinking else [self._markers.thought, self._markers.call]

    def _pass_marker(self) -> bool:
        """Act on the first marker in the tail, and say whether there may be another after it."""
        found = [(self._tail.index(each), each) for each in self._next_markers() if each and each in self._tail]
        if not found:
            return False
        start, marker = min(found)
        rest, self._tail = self._tail[start + len(marker) :], b""
        if marker == self._markers.call:
            self._begin(self._calls or [])
        elif marker == self._markers.call_end:
            self._end_call()
        else:
            self._thinking = marker == self._markers.thought
            if not self._thinking:
                self._begin_first()
        # A marker spelled in ordinary tokens may end within one.
        if self._matchers and rest:
            tokens = self._vocabulary.tokenize_bytes(rest)
            if any(matcher.try_consume_tokens(tokens) < len(tokens) for matcher in self._matchers):
                self._release(f"{rest!r} follows the opening tag")
            return False
        self._tail = rest
        return bool(rest)


def _bias(mask: np.ndarray, width: int) -> mx.array:
    # The logits may be wider than the vocabulary.
    bias = np.full(width, -np.inf, np.float32)
    allowed = _BIASES[mask.view(np.uint8)].ravel()[:width]
    bias[: allowed.size] = allowed
    return mx.array(bias)
