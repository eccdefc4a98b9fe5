"""Grammars that allow only valid tool calls and JSON."""

from flashmoe_mlx.constrain.processor import (
    Processor,
    can_constrain_calls,
    constrained,
    json,
    readable,
    vocabulary_of,
)

__all__ = ["Processor", "can_constrain_calls", "constrained", "json", "readable", "vocabulary_of"]
