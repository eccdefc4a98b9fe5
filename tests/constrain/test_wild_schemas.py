"""Schemas of any kind: no request fails because of one, no call is torn, and what is held fits."""

import json
import time
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools

from flashmoe_mlx import constrain
from tests.constrain.wild_schemas import PARAMETERS
from tests.constrain.writing import tool

# Ends of texts, objects, lists, parameters and calls, and starts of values: a model that wants to be done.
ENDS = ["\n</parameter>\n", "</function>\n", '"', "]", "}", '"}', "}\n", "</tool_call>", "b/x", "ab", "1", "a@b.co"]
_LONGEST = 600


@pytest.fixture(scope="module", params=["qwen3_coder", "json_tools"])
def caller(request):
    tokenizer = load_tokenizer(Path("demo/model"))
    if request.param == "json_tools":
        tokenizer._tool_parser = json_tools.parse_tool_call
    return tokenizer, constrain.vocabulary_of(tokenizer)


def call_at_random(constraint, tokenizer, seed: int) -> str | None:
    """Return a call of a model that wants anything; ``None`` if it is longer than an answer may be."""
    random = np.random.default_rng(seed)
    wishes = [tokenizer.encode(text, add_special_tokens=False) for text in ENDS]
    past, wish = [0], []
    for step in count():
        if step == _LONGEST:
            return None
        wish = wish or list(wishes[random.integers(len(wishes))])
        logits = random.normal(size=len(tokenizer)).astype(np.float32)
        logits[wish[0]] += 8
        token = int(mx.argmax(constraint(mx.array(past[-1:]), mx.array(logits[None]))).item())
        wish = wish[1:] if token == wish[0] else []
        assert token not in tokenizer.eos_token_ids or constraint.warnings, f"torn: {tokenizer.decode(past[1:])!r}"
        past.append(token)
        if token in tokenizer.eos_token_ids:
            return None
        text = tokenizer.decode(past[1:])
        if text.endswith(tokenizer.tool_call_end):
            return str(text)


def check(caller, schemas, seed: int) -> bool:
    """Check a call of one of the schemas, and say whether it was held to the end."""
    tokenizer, vocabulary = caller
    tools = [tool(schema, f"f{index}") for index, schema in enumerate(schemas)]
    constraint = constrain.constrained(tokenizer, tools=tools, tool_choice="required", vocabulary=vocabulary)
    text = call_at_random(constraint, tokenizer, seed)
    if text is None:
        return False
    inner = text.removeprefix(tokenizer.tool_call_start).removesuffix(tokenizer.tool_call_end)
    if any("to the end" in warning for warning in constraint.warnings):
        return False
    (call,) = constrain.read_calls(tokenizer, inner, tools)
    assert isinstance(json.loads(call.arguments), dict)
    fault = constrain.validate_call({"name": call.name, "arguments": call.arguments}, tools)
    free = [warning for warning in constraint.warnings if warning.startswith(call.name)]
    assert fault is None or free or "could not be checked" in fault, (fault, call, text)
    return True


_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(schemas=st.lists(PARAMETERS, min_size=1, max_size=2), seed=st.integers(0, 2**32))
def test_any_schema_leaves_calls_whole(caller, schemas, seed):
    check(caller, schemas, seed)


@pytest.mark.soak
def test_five_thousand_schemas_leave_calls_whole(caller):
    began, held = time.perf_counter(), []

    @settings(max_examples=2500, deadline=None, suppress_health_check=_SLOW)
    @given(schemas=st.lists(PARAMETERS, min_size=1, max_size=2), seed=st.integers(0, 2**32))
    def run(schemas, seed):
        held.append(check(caller, schemas, seed))

    run()
    print(f"\n{len(held)} wild schemas, {sum(held)} calls held, {time.perf_counter() - began:.0f} s")
    assert sum(held) > len(held) / 2


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(schema=PARAMETERS)
def test_any_schema_is_a_response_format(xml_tokenizer, vocabulary, schema):
    constraint = constrain.json(xml_tokenizer, schema, vocabulary=vocabulary)
    assert constraint(mx.array([0]), mx.zeros((1, len(xml_tokenizer)))).max().item() == 0
    assert not any("to the end" in warning for warning in constraint.warnings)
