"""Random requests, most of them invalid: none causes a server error."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from demo import MODEL
from demo.talk import TOOL
from tests.support.serving import CHAT, HERON, Running, serve

deterministic = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
numbers = st.one_of(st.integers(-3, 30), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
words = st.one_of(st.text(max_size=8), st.sampled_from(["", "user", "a", "<|im_end|>", "<tool_call>", "</think>"]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Generate objects with all or some of these fields."""
    return st.one_of(st.fixed_dictionaries(fields), st.fixed_dictionaries({}, optional=fields))


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


strings = {"type": "string"}, {"type": "string", "pattern": "a+"}, {"enum": ["a", 1]}
numeric = {"type": "integer", "minimum": "3"}, {"type": ["number", "null"], "multipleOf": 0}
lengths = {"type": "string", "maxLength": 500}, {"minLength": 5000}, {"format": "password"}, {"pattern": "(?=a)b"}
odd = {"type": "str"}, {"not": {}}, {"uniqueItems": True}, {"propertyNames": {"pattern": "^x"}}, {"const": None}, True
schemas = st.recursive(
    some({}, {"type": "integer"}, {"$ref": "#"}, {"type": "nonsense"}, *strings, *numeric, *lengths, *odd),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": some("array"), "items": inner}),
        st.fixed_dictionaries({"type": some("object"), "properties": st.dictionaries(words, inner, max_size=2)}),
        *(st.fixed_dictionaries({key: st.lists(inner, max_size=2)}) for key in ("anyOf", "oneOf", "allOf")),
    ),
    max_leaves=4,
)
KEYWORDS = [
    "type",
    "properties",
    "required",
    "items",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "$defs",
    "not",
]
KEYWORDS += ["minimum", "maximum", "minLength", "maxLength", "pattern", "format", "minItems", "additionalProperties"]


@st.composite
def nulled(draw: st.DrawFn, value: Any = None) -> Any:
    """Generate schemas in which nulls stand for, or beside, some of the parts at any depth."""
    value = draw(schemas) if value is None else value
    if draw(st.integers(0, 9)) == 0:
        return None
    if isinstance(value, dict):
        parts = {key: draw(nulled(part)) if part is not None else None for key, part in value.items()}
        return parts | dict.fromkeys(draw(st.lists(some(*KEYWORDS), max_size=2)))
    if isinstance(value, list):
        return [draw(nulled(part)) if part is not None else None for part in value]
    return value


texts = st.one_of(words, st.lists(record(type=some("text", "image_url"), text=words), max_size=2))
functions = record(
    name=some("f", "g", "", "two words"), description=words, parameters=st.one_of(schemas, nulled(), junk)
)
calls = record(
    id=some("1", "2"),
    type=some("function"),
    function=record(name=some("f"), arguments=some("{}", "", "[", "[]", '{"a": 1}', {"a": 1})),
)
messages = st.one_of(
    record(role=some("user", "system", "developer", "assistant", "tool", "robot"), content=texts, name=words),
    record(role=some("assistant"), content=texts, tool_calls=st.lists(calls, max_size=2), reasoning=words),
    record(role=some("tool"), content=texts, tool_call_id=some("1", "2")),
)
SAMPLING = {
    "model": words,
    "stream": st.booleans(),
    "stream_options": record(include_usage=st.booleans()),
    "max_tokens": some(1, 2, 3, 0, -1),
    "temperature": some(0, 0.7, 2, 3),
    "top_p": some(0, 0.5, 1),
    "top_k": some(0, 1, 5, 10**6),
    "min_p": some(0, 0.1, 1),
    "xtc_probability": some(0, 0.5, 1),
    "xtc_threshold": some(0, 0.1, 0.5, 1),
    "repetition_penalty": some(0, 1, 1.3),
    "presence_penalty": some(-2, 0, 1.5),
    "frequency_penalty": some(-2, 0, 1.5, 3),
    "logit_bias": st.dictionaries(some("0", "7", "100", "9999999", "x"), some(1, -100, 200), max_size=2),
    "seed": some(0, 7, -1, 2**63 - 1, 2**64),
    "stop": st.one_of(words, st.lists(words, max_size=3)),
    "n": some(1, 2),
    "user": words,
}
CHAT_FIELDS = SAMPLING | {
    "messages": st.lists(messages, max_size=4),
    "logprobs": st.booleans(),
    "top_logprobs": some(0, 3, 30),
    "tools": st.one_of(st.just([TOOL]), st.lists(record(type=some("function"), function=functions), max_size=2)),
    "tool_choice": some("auto", "none", "required", {"type": "function", "function": {"name": "f"}}),
    "parallel_tool_calls": st.booleans(),
    "response_format": st.one_of(
        some({"type": "text"}, {"type": "json_object"}, {"type": "xml"}),
        record(type=some("json_schema"), json_schema=record(name=words, schema=st.one_of(schemas, nulled()))),
    ),
    "reasoning_effort": some("none", "high"),
    "chat_template_kwargs": record(enable_thinking=st.booleans()),
}
tokens = st.lists(st.integers(-1, 7000), max_size=4)
COMPLETION_FIELDS = SAMPLING | {
    "prompt": st.one_of(words, tokens, st.lists(st.one_of(words, tokens), max_size=3)),
    "logprobs": some(0, 3, 30),
    "echo": st.booleans(),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    """Generate a path, and a valid body with some fields replaced, perhaps one of them by junk."""
    if draw(st.integers(0, 19)) == 0:
        return CHAT, draw(junk)
    path, body, fields = draw(
        some((CHAT, {"messages": HERON}, CHAT_FIELDS), ("/v1/completions", {"prompt": "heron"}, COMPLETION_FIELDS))
    )
    body = body | {"max_tokens": 1}
    for name in draw(st.lists(some(*fields), max_size=4, unique=True)):
        body[name] = draw(fields[name])
    if draw(st.integers(0, 4)) == 0:
        body[draw(st.one_of(some(*fields), words))] = draw(junk)
    return path, body


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server of a tiny random model with the demo model's tokens, for speed."""
    folder = tmp_path_factory.mktemp("tiny")
    config = qwen3_5_moe(layers=4, experts=8, top_k=2, hidden=64, intermediate=64, vocab=6144)
    write_checkpoint(folder, config, quantization={"group_size": 64, "bits": 8}, dtype=mx.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder)
    with serve(folder) as running:
        yield running


@pytest.mark.parametrize("count", [60, pytest.param(10000, marks=pytest.mark.soak)])
def test_no_request_causes_a_server_error(running: Running, count: int) -> None:
    outcomes: Counter[int] = Counter()

    @settings(deterministic, max_examples=count)
    @given(requests())
    def ask(request: tuple[str, Any]) -> None:
        path, fields = request
        status, _, answer = running.ask("POST", path, fields)
        outcomes[status] += 1
        assert status in (200, 400), answer
        if status == 400:
            assert set(answer["error"]) == {"message", "type", "param", "code"}
        elif fields.get("stream"):
            events = answer.removesuffix("\n\n").split("\n\n")
            assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
            assert not any("error" in json.loads(event[6:]) for event in events[:-1])
        else:
            assert answer["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")

    ask()
    print(dict(outcomes))
    assert outcomes[200] and outcomes[400]
    assert running.worker.gauges()["running_requests"] == 0
    assert running.chat(messages=HERON, max_tokens=1)[0] == 200


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.soak)])
def test_no_schema_causes_a_server_error(running: Running, count: int) -> None:
    outcomes: Counter[int] = Counter()

    @settings(deterministic, max_examples=count)
    @given(nulled(), st.booleans(), st.booleans())
    def ask(schema: Any, is_tool: bool, stream: bool) -> None:
        fields: dict[str, Any] = {"messages": HERON, "max_tokens": 2, "stream": stream}
        if is_tool:
            function = {"name": "lookup", "parameters": schema}
            fields |= {"tools": [TOOL, {"type": "function", "function": function}], "tool_choice": "required"}
        else:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, answer = running.chat(**fields)
        outcomes[status] += 1
        assert status == 200 or answer["error"]["param"].startswith(("tools", "response_format")), answer
        assert status in (200, 400)
        if status == 200 and stream:
            assert '"error"' not in answer

    ask()
    print(dict(outcomes))
    assert outcomes[200] > outcomes[400]


@settings(deterministic, max_examples=60)
@given(st.binary(max_size=40), st.dictionaries(st.from_regex(r"\A[A-Za-z-]{1,12}\Z"), st.text("aZ09 ,;="), max_size=3))
def test_no_body_or_header_causes_a_server_error(running: Running, body: bytes, headers: dict[str, str]) -> None:
    status, _, answer = running.ask("POST", CHAT, body, headers)
    assert 400 <= status < 500 and answer["error"]["message"]
