"""The server as its clients meet it: OpenAI's own, strangers, and those that make mistakes or go away."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from demo.talk import TOOL
from flashmoe_mlx import generate
from flashmoe_mlx.serving import http
from tests.support.serving import Running, serve

Messages = list[ChatCompletionMessageParam]
HERON: Messages = [{"role": "user", "content": "What is a heron?"}]
DEFINITION = "heron (noun): grey or white wading bird with long neck and long legs and (usually) long bill."
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return running.client()


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=HERON)
    assert answer.choices[0].message.content == DEFINITION
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "demo"
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 25)


def test_the_text_is_that_of_generate(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Tell me a story about a sofa."
    generate.main(["--prompt", question, "--max-tokens", "30", "--verbose", "False"])
    messages: Messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="any", messages=messages, max_tokens=30)
    assert f"{answer.choices[0].message.content}\n" == capsys.readouterr().out


def test_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=HERON, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == DEFINITION
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 25


def test_two_calls_and_their_results(client: openai.OpenAI) -> None:
    """The results go back in another order than that of the calls, and each still belongs to its own."""
    messages: Messages = [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}]
    options: Any = {"model": "any", "tools": [TOOL], "max_tokens": 100}
    choice = client.chat.completions.create(messages=messages, **options).choices[0]
    calls = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
    messages.append(choice.message)
    weather = {calls[0].id: {"temperature": 3, "sky": "cloudy"}, calls[1].id: {"temperature": 29, "sky": "clear"}}
    for call_id in reversed(weather):
        messages.append({"role": "tool", "tool_call_id": call_id, "content": json.dumps(weather[call_id])})
    answer = client.chat.completions.create(messages=messages, **options)
    said = "It is 3 degrees and cloudy in Oslo. It is 29 degrees and clear in Rome."
    assert answer.choices[0].message.content == said


def test_calls_in_a_stream(client: openai.OpenAI) -> None:
    messages: Messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    chunks = list(
        client.chat.completions.create(model="any", messages=messages, tools=[TOOL], stream=True, max_tokens=60)
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.arguments) for call in calls if call.function] == [(0, '{"city": "Oslo"}')]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_one_call_where_more_are_not_wanted(client: openai.OpenAI) -> None:
    question: Messages = [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}]
    options: Any = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 100}
    answer = client.chat.completions.create(model="any", messages=question, **options)
    calls = answer.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Oslo"}]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_tool_is_called_where_none_may_be(client: openai.OpenAI) -> None:
    question: Messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = client.chat.completions.create(model="any", messages=question, tools=[TOOL], tool_choice="none")
    assert not answer.choices[0].message.tool_calls and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
def test_a_call_that_must_come(client: openai.OpenAI, choice: Any) -> None:
    """Whatever the question, and what its arguments may be as the schema says."""
    legs = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"legs": legs}, "required": ["legs"]}
    count: Any = {"type": "function", "function": {"name": "count", "parameters": schema}}
    answer = client.chat.completions.create(
        model="any", messages=HERON, tools=[count] if choice == "required" else [TOOL, count], tool_choice=choice
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0].function.name == "count"
    jsonschema.validate(json.loads(calls[0].function.arguments), schema)


SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 12}, "legs": {"type": "integer", "maximum": 9}},
    "required": ["word", "legs"],
    "additionalProperties": False,
}


def test_json_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "bird", "schema": SCHEMA, "strict": True}}
    chunks = client.chat.completions.create(
        model="any", messages=HERON, response_format=wanted, stream=True, max_tokens=60
    )
    jsonschema.validate(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), SCHEMA)


def test_json_object(client: openai.OpenAI, running: Running) -> None:
    # The model would never end by itself: first a string, then the object.
    ends = {str(running.worker.tokenizer.encode(end)[0]): bias for end, bias in (('"', 100), ("}", 50))}
    answer = client.chat.completions.create(
        model="any",
        messages=HERON,
        response_format={"type": "json_object"},
        logit_bias=ends,
        max_tokens=60,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_stops(client: openai.OpenAI) -> None:
    """They need not be whole tokens, are not told, and nothing before them is lost."""
    answer = client.chat.completions.create(model="any", messages=HERON, stop=["xyz", "ding bi"])
    assert answer.choices[0].message.content == DEFINITION.partition("ding bi")[0]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="any", messages=HERON, stop=" bill!", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == DEFINITION


def test_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": "any", "messages": HERON, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.logprobs and whole.logprobs.content
    assert "".join(token.token for token in whole.logprobs.content) == whole.message.content
    for token in whole.logprobs.content:
        assert bytes(token.bytes or []).decode() == token.token
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token and token.logprob == token.top_logprobs[0].logprob <= 0
    chunks = client.chat.completions.create(**options, stream=True)
    told = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or []]
    assert told == whole.logprobs.content


def test_completions(client: openai.OpenAI, running: Running) -> None:
    text = "heron (noun):"
    answer = client.completions.create(model="any", prompt=text, max_tokens=8, logprobs=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and choice.logprobs and answer.usage.completion_tokens == 8
    assert choice.logprobs.tokens and len(choice.logprobs.tokens) == 8
    assert choice.logprobs.text_offset and choice.logprobs.text_offset[0] == 0
    tokens = running.worker.tokenizer.encode(text)
    again = client.completions.create(model="any", prompt=tokens, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in again) == choice.text


def test_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model="any",
            prompt="The",  # begins nothing that it knows by heart
            max_tokens=16,
            temperature=2,
            seed=seed,
            extra_body={"repetition_penalty": 1.1, "top_k": 500, "min_p": 0.0001},
        )
        return answer.choices[0].text

    assert sample(7) == sample(7) != sample(-8)


def test_penalties_and_biases(client: openai.OpenAI, running: Running) -> None:
    token = running.worker.tokenizer.encode("heron")[0]
    answer = client.chat.completions.create(model="any", messages=HERON, max_tokens=5, logit_bias={str(token): -100})
    assert not (answer.choices[0].message.content or "").startswith("heron")
    answer = client.chat.completions.create(model="any", messages=HERON, extra_body={"repetition_penalty": 9})
    assert answer.choices[0].message.content != DEFINITION


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "local"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_metrics_and_health(running: Running) -> None:
    running.chat(messages=HERON, max_tokens=2)
    _, headers, text = running.ask("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['flashmoe_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["flashmoe_generated_tokens_total"]) >= 2
    assert float(values["flashmoe_prefix_bytes"]) > 0
    for name in values:
        assert f"# TYPE {name.partition('{')[0]} " in text
    assert running.ask("GET", "/health")[2] == {"status": "ok"}


def test_what_mlx_lm_accepts(running: Running) -> None:
    """mlx-lm's own tests of its server ask these."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a heron?"}]}]
    said = running.chat(messages=parts, max_tokens=4)[1]["choices"][0]["message"]["content"]
    assert said and DEFINITION.startswith(said)
    for arguments in ('{"a": 2, "b": 3}', {"a": 2, "b": 3}):
        call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "what is 2+3?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ]
        assert running.chat(messages=messages, max_tokens=3)[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"heron": 1}}, "logit_bias"),
        ({"stop": ["a", 3]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"functions": []}, None),
        ({"adapters": "other"}, None),
        ({"draft_model": "other"}, None),
        ({"modalities": ["audio"]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": HERON * 1025}, "messages"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_wrong_is_named(running: Running, fields: dict[str, Any], param: str | None) -> None:
    status, answer = running.chat(**{"messages": HERON} | fields)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    if param is None:
        assert next(iter(fields)) in answer["error"]["message"]
    else:
        assert str(answer["error"]["param"]).startswith(param), answer


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": "\xff"}', b"[" * 100000, b'{"a": 1e999}'])
def test_what_is_no_request(running: Running, body: bytes) -> None:
    status, _, answer = running.ask("POST", CHAT, body)
    assert status == 400 and answer["error"]["message"]


def test_too_long(running: Running) -> None:
    status, answer = running.chat(messages=[{"role": "user", "content": "heron " * 10000}])
    assert (
        status == 400 and answer["error"]["code"] == "context_length_exceeded" and "8,192" in answer["error"]["message"]
    )


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Host": ""}, 403),
        ("GET", "/health", {"Origin": "http://evil.example"}, 403),
        ("GET", "/health", {"Origin": "null"}, 403),
        ("GET", "/health", {"X": "x" * 20000}, 431),
        ("OPTIONS", "/v1/models", {}, 403),
        ("PUT", "/v1/models", {}, 501),
        ("GET", "/", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/health", {"Content-Length": "0"}, 405),
        ("POST", "/v1/chat/completions", {"Content-Length": "99999999"}, 413),
        ("POST", "/v1/chat/completions", {"Content-Length": "-1"}, 411),
        ("POST", "/v1/chat/completions", {"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_strangers_are_refused(running: Running, method: str, path: str, headers: dict[str, str], status: int) -> None:
    answered, _, answer = running.ask(method, path, headers=headers)
    assert answered == status and answer["error"]["message"]


def test_a_body_that_is_too_large_gets_its_reason(running: Running) -> None:
    assert running.ask("POST", CHAT, bytes(http.MAX_BODY_BYTES + 1))[0] == 413
