"""The text on which models are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Text:
    """A tokenized text.

    Args:
        tokens (Sequence[int]): At least two.
        context (int): Tokens after which the models start with an empty cache again.

    Raises:
        ValueError: There are fewer than two tokens.
    """

    tokens: Sequence[int]
    context: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens: it needs at least two, one to show and one to predict"
            )

    @classmethod
    def encode(
        cls,
        text: str,
        tokenizer: TokenizerWrapper,
        reference: TokenizerWrapper,
        context: int,
        max_positions: int | None = None,
    ) -> Self:
        """Tokenize a text for a model and its reference.

        Args:
            text (str): The text.
            tokenizer (TokenizerWrapper): Of the model.
            reference (TokenizerWrapper): Of the reference.
            context (int): Tokens after which the models start with an empty cache again.
            max_positions (int, optional): Tokens to predict at most. Default: ``None``, all.

        Raises:
            ValueError: The two tokenizers disagree, or there are fewer than two tokens.
        """
        # verbose=False: a text longer than the model's context is fine, because it is read in windows.
        tokens = tokenizer.encode(text, verbose=False)
        if reference.encode(text, verbose=False) != tokens:
            raise ValueError("the reference has another tokenizer than the model: they cannot be compared on a text")
        return cls(tokens if max_positions is None else tokens[: max_positions + 1], context)

    @property
    def positions(self) -> int:
        """Number of tokens to predict, which is all but the first."""
        return len(self.tokens) - 1
