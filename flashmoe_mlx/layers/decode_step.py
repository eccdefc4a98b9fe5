"""Decode steps, told from prompts by their number of tokens."""

import mlx.core as mx

MAX_TOKENS = 8
"""Tokens of a decode step. In longer calls the device has enough to do without overlap and fusion."""


def is_decode_step(x: mx.array) -> bool:
    """Return whether activations ``[..., width]`` belong to a decode step."""
    return x.size <= MAX_TOKENS * x.shape[-1]
