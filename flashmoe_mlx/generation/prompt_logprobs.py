"""Logprobs of a prompt's own tokens, from the logits of its prefill."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# The logits of a prefill chunk: this many values at most take 256 MB as float32.
_MAX_LOGITS = 2**26
_MIN_CHUNK = 16


@dataclass(frozen=True)
class PromptToken:
    """A token of a prompt, with its logprob.

    Args:
        id (int): Its index in the vocabulary.
        logprob (float, optional): Natural logarithm of its probability after the tokens before it; ``None`` for the
            first token.
        top_logprobs (tuple[tuple[int, float], ...]): Id and logprob of the most likely tokens in its place.
    """

    id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class PromptLogprobs:
    """Collects the logprobs of a prompt chunk by chunk.

    Args:
        tokens (Sequence[int]): The prompt, at least one token.
        top (int): How many of the most likely tokens to report with each token.

    Attributes:
        tokens (list[PromptToken]): The tokens whose logprobs are known so far.
    """

    def __init__(self, tokens: Sequence[int], top: int):
        self._prompt, self._top = list(tokens), top
        self.tokens = [PromptToken(self._prompt[0], None, ())]

    def add(self, logits: mx.array) -> None:
        """Add the next chunk.

        Args:
            logits (array): The logits after each token of the chunk, ``[1, length, vocabulary]``.
        """
        logits = logits[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        first = len(self.tokens)
        targets = self._prompt[first : first + len(logprobs)]
        own = mx.take_along_axis(logprobs, mx.array(targets)[:, None], axis=-1)[:, 0]
        own_values, values = np.array(own), np.array(logprobs) if self._top else None
        for row, token in enumerate(targets):
            top = () if values is None else top_logprobs(values[row], self._top)
            self.tokens.append(PromptToken(token, finite(own_values[row]), top))


def scored_chunk(vocabulary: int) -> int:
    """Return the largest number of tokens in a prefill chunk whose logits are needed.

    Args:
        vocabulary (int): Number of tokens in the vocabulary.
    """
    return max(_MIN_CHUNK, _MAX_LOGITS // vocabulary)


def top_logprobs(logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """Return id and logprob of the most likely tokens, the most likely one first.

    Args:
        logprobs (ndarray): Of all tokens, ``[vocabulary]``.
        count (int): How many to return.
    """
    if count == 0:
        return ()
    # Sorting all of a large vocabulary takes 10 ms.
    count = min(count, logprobs.size)
    tokens = np.flatnonzero(logprobs >= np.partition(logprobs, -count)[-count])
    best = tokens[np.argsort(-logprobs[tokens], kind="stable")][:count]
    return tuple((int(token), finite(logprobs[token])) for token in best)


def finite(logprob: float) -> float:
    """Return a number that JSON can hold; OpenAI's API reports -9999 for impossible tokens."""
    return max(float(logprob), -9999.0)
