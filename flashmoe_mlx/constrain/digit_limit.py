"""The longest run of digits in a number, since a weak model repeats one digit without end."""

from functools import cached_property
from typing import Any

import numpy as np

MAX_DIGITS = 80
"""Digits in a row. The integers of any programming language's fixed types have fewer."""

_DIGITS = b"0123456789"
# Only a text may go on with one of these: a number has no letters but those of its exponent.
_TEXT_ONLY = bytes(set(range(33, 127)) - set(_DIGITS + b".eE+-,:]}<"))


class DigitLimit:
    """Ends numbers after :data:`MAX_DIGITS` digits in a row. Digits inside of texts are not limited.

    Args:
        vocabulary (LLTokenizer): llguidance's tokenizer.
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._run = 0

    def advance(self, token: int) -> None:
        """Count the digits that the text so far ends with."""
        text = self._vocabulary.decode_bytes([token])
        other = text.rstrip(_DIGITS)
        self._run = len(text) - len(other) + (0 if other else self._run)

    def restrict(self, mask: np.ndarray) -> np.ndarray:
        """Return a mask without the tokens that continue a number which is long enough.

        Args:
            mask (np.ndarray): Bits of the allowed tokens, int32, lowest first.

        Returns:
            np.ndarray: The same mask, if the digits belong to a text or nothing else could follow.
        """
        if self._run < MAX_DIGITS:
            return mask
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)[: self._first_bytes.size]
        if np.isin(self._first_bytes[allowed], np.frombuffer(_TEXT_ONLY, np.uint8)).any():
            return mask
        allowed &= ~np.isin(self._first_bytes, np.frombuffer(_DIGITS, np.uint8))
        if not allowed.any():
            return mask
        bits = np.zeros(mask.size * 32, bool)
        bits[: allowed.size] = allowed
        return np.packbits(bits, bitorder="little").view(mask.dtype)

    @cached_property
    def _first_bytes(self) -> np.ndarray:
        """The first byte of each token, uint8; 0 for tokens without text."""
        texts = (self._vocabulary.decode_bytes([token]) for token in range(self._vocabulary.vocab_size))
        return np.fromiter((text[0] if text else 0 for text in texts), np.uint8)
