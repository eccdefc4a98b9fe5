"""Constrained calls and JSON, token by token, on the demo model's tokenizer."""

import json
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools

from flashmoe_mlx import constrain

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "count": {"type": "integer"},
                "kind": {"enum": ["noun", "verb"]},
            },
            "required": ["word"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path("demo/model"))


def accepts(processor, tokenizer, *texts: str) -> bool:
    """Say whether every token of the texts, each encoded by itself, is allowed in its place."""
    width, past = len(tokenizer.get_vocab()) + 8, [0]
    for token in (token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)):
        if processor(mx.array(past), mx.zeros((1, width)))[0, token].item() != 0:
            return False
        past.append(token)
    return True


def call(body: str, name: str = "look") -> str:
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


WORD = "<parameter=word>\na heron\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (call(WORD), True),
        ("Let me see.\n" + call(WORD) + "\nand more " + call(WORD), True),
        (call(WORD + "<parameter=count>\n12\n</parameter>\n<parameter=kind>\nnoun\n</parameter>\n"), True),
        (call(WORD + "<parameter=count>\ntwo\n</parameter>\n"), False),
        (call(WORD + "<parameter=kind>\nadverb\n</parameter>\n"), False),
        (call(""), False),
        (call("<parameter=count>\n12\n</parameter>\n" + WORD), True),
        (call(WORD + WORD), False),
        (call(WORD, "other"), False),
    ],
)
def test_a_call_fits_its_schema(tokenizer, text, fits):
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL]), tokenizer, text) is fits


@pytest.mark.parametrize(
    ("arguments", "fits"), [('{"word": "a"}', True), ('{"word":"a"}', True), ('{"count": 1}', False)]
)
def test_a_hermes_call_fits_its_schema(tokenizer, monkeypatch, arguments, fits):
    monkeypatch.setattr(tokenizer, "_tool_parser", json_tools.parse_tool_call)
    text = f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL]), tokenizer, text) is fits


@pytest.mark.parametrize(("digit", "fits"), [("7", True), ("\u0667", False)])
def test_classes_of_patterns_are_ascii(tokenizer, digit, fits):
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "string", "pattern": r"^[\da]+$"}}}}}
    text = call(f"<parameter=x>\na{digit}\n</parameter>\n", "f")
    assert accepts(constrain.constrained(tokenizer, tools=[tool]), tokenizer, text) is fits


@pytest.mark.parametrize(("text", "fits"), [('{"n":3}', True), ('{"n":"x"}', False), ("Well", False)])
def test_json_from_the_first_token(tokenizer, text, fits):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert accepts(constrain.json(tokenizer, schema), tokenizer, text) is fits


def test_json_begins_after_thinking(tokenizer):
    for text, fits in [("free</think>\n\n{}", True), ("free</think>\n\nno", False)]:
        assert accepts(constrain.json(tokenizer, {"type": "object"}, thinking=True), tokenizer, text) is fits


OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("choice", "text", "fits"),
    [
        ("required", call(WORD), True),
        ("required", call("", "other"), True),
        ("required", call(WORD) + "\nText, and " + call("", "other"), True),
        ("required", call(WORD) + "\n" + call(""), False),
        ("required", "Let me see. " + call(WORD), False),
        ("required", "<|im_end|>", False),
        (NAMED, call(WORD), True),
        (NAMED, call("", "other"), False),
        (NAMED, call(WORD) + call("", "other"), False),
    ],
)
def test_tool_choice_decides_which_call_must_come_first(tokenizer, choice, text, fits):
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL, OTHER], tool_choice=choice), tokenizer, text) is fits


@pytest.mark.parametrize("choice", ["none", "any", {"function": {"name": "missing"}}])
def test_other_choices_are_refused(tokenizer, choice):
    with pytest.raises(ValueError, match="tool_choice"):
        constrain.constrained(tokenizer, tools=[TOOL], tool_choice=choice)


@pytest.mark.parametrize(
    ("choice", "text", "fits"),
    [
        ("auto", "A <tool_call> opens a call.</think>\n\nText", True),
        ("auto", "A <tool_call> opens a call.</think>\n\n" + call(WORD), True),
        ("auto", "Well.</think>\n\n" + call(""), False),
        ("auto", "Well.</think>\n<think>A <tool_call>?</think>" + call(WORD), True),
        ("required", "A <tool_call> opens a call.</think>\n\n" + call(WORD), True),
        ("required", "A <tool_call> opens a call.</think>\n\nText", False),
        ("required", "A thought.<|im_end|>", False),
        ("auto", "A thought.<|im_end|>", True),
        ("required", "</think>" + call(WORD) + "<think>again</think>Text", True),
    ],
)
def test_thoughts_may_mention_calls(tokenizer, choice, text, fits):
    processor = constrain.constrained(tokenizer, tools=[TOOL], tool_choice=choice, thinking=True)
    assert accepts(processor, tokenizer, text) is fits


@pytest.mark.parametrize(("rest", "fits"), [(WORD, True), ("", False)])
def test_a_mark_in_ordinary_tokens_opens_a_call(tokenizer, rest, fits):
    texts = ["Now <", "tool", "_call", ">", call(rest).removeprefix("<tool_call>")]
    assert accepts(constrain.constrained(tokenizer, tools=[TOOL]), tokenizer, *texts) is fits


def test_text_without_calls_is_untouched(tokenizer):
    processor, logits = constrain.constrained(tokenizer, tools=[TOOL]), mx.random.normal((1, 9000))
    past = [0]
    for token in tokenizer.encode("No call, <tool_response> or not.</tool_call>", add_special_tokens=False):
        assert processor(mx.array(past), logits) is logits
        past.append(token)


WISHES = ["null", "Null", "12", "-0.5e9", "true", '{"a": [1]}', "[null]", " [1, 2]", "\n", "<tool_call>", '"', "\\"]
WISHES += [
    "\n</parameter>\n<parameter=p0>\n1",
    "</parameter>",
    "</function>",
    "</tool_call>",
    "<|im_end|>",
    "'",
    "99999",
]
ENDS = ["\n</parameter>\n</function>\n", '"', "]", "}"]
# Some patterns and formats need these before an end.
ENDS += [end + close for end in ("b/x", "@b.co") for close in ("\n</parameter>\n", '"')]
SCALARS = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 4)] * 2
    ),
    st.sampled_from([r"^[a-z]{2,4}$", r"^\d+$", "b", "^(a|b)", r"/x$", "n|m", r"^\$\d\.\d\d$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "uuid", "email", "ipv4"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.just({"type": "integer"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 50),
    ),
    st.sampled_from([{}, {"minimum": 0.5}, {"maximum": 3}]).map(lambda bounds: {"type": "number", **bounds}),
    st.just({"type": "boolean"}),
    st.sampled_from(["noun", "a <b>", "12", "", 7, -1.5, True, None, "{", "null", [1, "a"]]).map(
        lambda value: {"const": value}
    ),
    st.lists(st.sampled_from(["noun", "verb", "3", 4, 5, False]), min_size=1, max_size=4, unique_by=json.dumps).map(
        lambda values: {"enum": values}
    ),
    st.just({"type": "string", "enum": ["one", "two", "null"]}),
)


def objects(values):
    def schema(properties, optional):
        named = {f"p{number}": value for number, value in enumerate(properties)}
        required = [key for number, key in enumerate(named) if not optional >> number & 1]
        return {"type": "object", "properties": named, "required": required, "additionalProperties": False}

    return st.builds(schema, st.lists(values, max_size=3), st.integers(0, 7))


def arrays(values):
    return st.builds(
        lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": 3}, values, st.integers(0, 1)
    )


NESTED = st.recursive(SCALARS, lambda values: st.one_of(arrays(values), objects(values)), max_leaves=4)
VALUES = st.one_of(
    SCALARS,
    NESTED,
    NESTED.map(lambda schema: {"anyOf": [schema, {"type": "null"}], "default": None}),
    st.lists(SCALARS, min_size=2, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    st.sets(st.sampled_from(["string", "integer", "number", "boolean", "null", "array"]), min_size=1).map(
        lambda types: {"type": sorted(types)}
    ),
    st.just({"oneOf": [{"type": "string"}, {"type": "object"}]}),
    st.just({"$ref": "#/$defs/tree"}),
    st.just({}),
)
TREE = {"type": "object", "properties": {"leaf": {"type": "string"}, "next": {"$ref": "#/$defs/tree"}}}
TREE |= {"required": ["leaf"], "additionalProperties": False}
PARAMETERS = objects(VALUES).map(lambda schema: schema | {"$defs": {"tree": TREE}})


def written_at_random(processor, tokenizer, pieces, seed: int) -> str:
    """Generate with a model that wants anything, bad texts above all, and after a while an end."""
    random = np.random.default_rng(seed)
    past, wish = [0], []
    for step in count():
        assert step < 800, f"no end: {tokenizer.decode(past)!r}"
        if not wish:
            wish = tokenizer.encode(str(random.choice(WISHES if step < 40 else ENDS)), add_special_tokens=False)
        logits = random.normal(size=len(pieces)).astype(np.float32)
        logits[wish[0]] += 8
        token = int(mx.argmax(processor(mx.array(past), mx.array(logits[None]))).item())
        wish = wish[1:] if token == wish[0] else []
        past.append(token)
        if pieces[token] == tokenizer.tool_call_end:
            return str(tokenizer.decode(past[1:]))


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return constrain.vocabulary_of(tokenizer)


@pytest.fixture(scope="module", params=["qwen3_coder", "json_tools"])
def caller(request):
    """A tokenizer whose model writes calls of a format."""
    tokenizer = load_tokenizer(Path("demo/model"))
    if request.param == "json_tools":
        tokenizer._tool_parser = json_tools.parse_tool_call
    return tokenizer, [tokenizer.decode([token]) for token in range(len(tokenizer))]


def check_a_call_at_random(caller, vocabulary, schemas, seed):
    tokenizer, pieces = caller
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": each}} for i, each in enumerate(schemas)]
    try:
        processor = constrain.constrained(tokenizer, tools=tools, tool_choice="required", vocabulary=vocabulary)
    except ValueError:
        reject()
    text = written_at_random(processor, tokenizer, pieces, seed)
    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
    assert text.startswith(start) and text.count(end) == 1
    call = tokenizer.tool_parser(text.removeprefix(start).removesuffix(end).strip(), constrain.readable(tools))
    schema = schemas[int(call["name"][1:])]
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(call["arguments"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(schemas=st.lists(PARAMETERS, min_size=1, max_size=2), seed=st.integers(0, 2**32))
def test_any_model_writes_calls_that_fit(caller, vocabulary, schemas, seed):
    check_a_call_at_random(caller, vocabulary, schemas, seed)


@pytest.mark.soak
@settings(max_examples=2000, deadline=None)
@given(schemas=st.lists(PARAMETERS, min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_any_model_writes_many_calls_that_fit(caller, vocabulary, schemas, seed):
    check_a_call_at_random(caller, vocabulary, schemas, seed)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"x": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"x": {"type": "string", "pattern": "(?=a)b"}}}, "regex"),
        ({"properties": {"x": {"type": "string", "format": "iri"}}}, r"f\.x: the format 'iri'"),
        ({"properties": {"x": {"type": "string", "not": {}}}}, r"f\.x: not"),
        ({"properties": {"x": {"enum": ["null"]}}}, r"f\.x: .* cannot read any"),
        ({"properties": {"x": {"$ref": "#/nowhere"}}}, r"f\.x: .*#/nowhere"),
        ({"properties": {"two words": {}}}, r"f\.two words: names"),
        ({"properties": {"x": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, r"f\.x: oneOf"),
        ({"minProperties": 1}, "f: minProperties"),
        ({"required": ["x"]}, "f: x is required"),
        ({"properties": {f"x{i}": {} for i in range(65)}}, "f: 65 parameters"),
    ],
)
def test_unsupported_schemas_are_refused_in_one_line(tokenizer, schema, message):
    tool = {"function": {"name": "f", "parameters": {"type": "object", **schema}}}
    with pytest.raises(ValueError, match=message) as caught:
        constrain.constrained(tokenizer, tools=[tool])
    assert "\n" not in str(caught.value)
