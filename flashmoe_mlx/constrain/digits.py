"""A limit for numbers, which a weak model could fill with digits without an end."""

import functools
import re
from typing import Any

import numpy as np

MAX_DIGITS = 100
"""Digits of a number in a row. Integers of 256 bits have 78."""

_LAST_DIGITS = re.compile(rb"[0-9]*\Z")


class DigitRun:
    """Counts the digits at the end of a text.

    Args:
        vocabulary (LLTokenizer): llguidance's tokenizer.
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._length = 0
        self._before = b""

    def add(self, token: int) -> None:
        """Add the next token of the text."""
        text = self._vocabulary.decode_bytes([token])
        found = _LAST_DIGITS.search(text)
        start = found.start() if found else len(text)
        if start == 0:
            self._length += len(text)
        else:
            self._length, self._before = len(text) - start, text[start - 1 : start]

    def limit(self, mask: np.ndarray) -> np.ndarray:
        """Return the bits of the tokens that may come next, without those that go on with a number of full length.

        Args:
            mask (array): One bit per token, ``[tokens / 32]``, int32.
        """
        # A text of digits alone begins after a quotation mark.
        if self._length < MAX_DIGITS or self._before == b'"':
            return mask
        digits, letter = _tokens(self._vocabulary)
        shorter: np.ndarray = mask & ~digits
        # Inside a text, letters are possible as well.
        return mask if (mask & letter).any() or not shorter.any() else shorter


@functools.lru_cache(maxsize=8)
def _tokens(vocabulary: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of the tokens that begin with a digit, and of those that are a letter."""
    texts = [vocabulary.decode_bytes([token]) for token in range(vocabulary.vocab_size)]
    tests = [[text[:1].isdigit() for text in texts], [len(text) == 1 and text in b"qxyz" for text in texts]]
    width = -(-vocabulary.vocab_size // 32) * 32
    masks = [np.packbits(np.pad(bits, (0, width - len(bits))), bitorder="little").view(np.int32) for bits in tests]
    return masks[0], masks[1]
