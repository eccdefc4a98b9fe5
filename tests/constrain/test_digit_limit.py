"""A number ends after 80 digits in a row, and a text of digits does not."""

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from flashmoe_mlx import constrain
from flashmoe_mlx.constrain.digit_limit import MAX_DIGITS


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


def write(tokenizer: Any, schema: dict[str, Any], tokens: int = 400) -> str:
    """Return what a model writes that wants nothing but sevens, then quotes, and else an end."""
    processor = constrain.json(tokenizer, schema)
    size = len(tokenizer)
    logits = mx.full((1, size), -50.0)
    wishes = {"7": 0.0, '"': -1.0, "}": -2.0, "]": -3.0}
    for text, wish in wishes.items():
        for token in tokenizer.encode(text, add_special_tokens=False)[:1]:
            logits[0, token] = wish
    for token in tokenizer.eos_token_ids:
        logits[0, token] = 1.0
    written: list[int] = [0]
    for _ in range(tokens):
        token = int(mx.argmax(processor(mx.array(written), mx.array(logits))[0]).item())
        if token in tokenizer.eos_token_ids:
            break
        written.append(token)
    return str(tokenizer.decode(written[1:]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}, "maxItems": 1, "minItems": 1},
        {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
    ],
)
def test_a_number_ends_by_itself(tokenizer: Any, schema: dict[str, Any]) -> None:
    text = write(tokenizer, schema)
    assert json.loads(text) is not None
    assert text.count("7") <= MAX_DIGITS + 8


def test_digits_of_a_text_are_not_limited(tokenizer: Any) -> None:
    assert write(tokenizer, {"type": "string"}, tokens=300).count("7") > 2 * MAX_DIGITS
