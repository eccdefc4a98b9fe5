"""Parameters of sampling that depend on the tokenizer."""

from mlx_lm.tokenizer_utils import TokenizerWrapper


def xtc_special_tokens(tokenizer: TokenizerWrapper) -> list[int]:
    """Return the tokens that XTC sampling never removes: those of a line break, and ends of an answer."""
    return [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
