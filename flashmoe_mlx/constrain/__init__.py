"""Grammars that allow only valid tool calls and JSON."""

from flashmoe_mlx.constrain.call import Call
from flashmoe_mlx.constrain.constraint import Constraint
from flashmoe_mlx.constrain.processor import (
    Processor,
    can_constrain_calls,
    constrained,
    json,
    vocabulary_of,
)
from flashmoe_mlx.constrain.reading import read_calls
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.validation import validate_call

__all__ = [
    "Call",
    "Constraint",
    "Processor",
    "Schema",
    "can_constrain_calls",
    "constrained",
    "json",
    "read_calls",
    "validate_call",
    "vocabulary_of",
]
