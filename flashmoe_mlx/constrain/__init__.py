"""Grammars that allow only valid tool calls and JSON."""

from flashmoe_mlx.constrain.processor import (
    Processor,
    can_constrain_calls,
    constrained,
    json,
    vocabulary_of,
)
from flashmoe_mlx.constrain.schema import Schema
from flashmoe_mlx.constrain.xml_calls import readable

__all__ = ["Processor", "Schema", "can_constrain_calls", "constrained", "json", "readable", "vocabulary_of"]
