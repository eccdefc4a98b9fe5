"""Streams while the model writes what is not text for the user: signs of life, and calls in pieces."""

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from demo.talk import TOOL
from flashmoe_mlx.constrain import Constraint
from flashmoe_mlx.serving import routes
from flashmoe_mlx.serving.openai import chat_choice
from tests.support.serving import HERON, Messages, Running, connected, endless, serve

OSLO: Messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
TWO: Messages = [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ROOM = tool(
    "book", nights={"type": "integer", "maximum": 99}, breakfast={"type": "boolean"}, guest={"enum": ["A b", "c"]}
)
NESTED = tool("note", tags={"type": "array", "items": {"enum": ["bird", "\u00e9"]}, "minItems": 2, "maxItems": 2})
NOTHING = tool("now")


def events(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream."""
    *parts, end = text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts if not part.startswith(":")]


def collected(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the calls of a stream together as OpenAI's clients do, and check the form of its parts."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for part in chunk["choices"][0]["delta"].get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
            assert part["index"] == len(calls) - 1
            calls[-1]["arguments"] += part["function"]["arguments"]
    return calls


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": OSLO, "tools": [TOOL]},
        {"messages": TWO, "tools": [TOOL]},
        {"messages": TWO, "tools": [TOOL], "parallel_tool_calls": False},
        {"messages": HERON, "tools": [ROOM], "tool_choice": "required"},
        {"messages": HERON, "tools": [NESTED, NOTHING], "tool_choice": "required"},
        {"messages": HERON, "tools": [NOTHING, ROOM], "tool_choice": {"type": "function", "function": {"name": "now"}}},
    ],
)
def test_pieces_of_calls_add_up_to_the_whole_calls(running: Running, fields: dict[str, Any]) -> None:
    fields = fields | {"max_tokens": 100}
    whole = running.chat(**fields)[1]["choices"][0]
    chunks = events(running.chat(**fields, stream=True)[1])
    calls = collected(chunks)
    expected = [call["function"] for call in whole["message"]["tool_calls"]]
    assert [{"name": call["name"], "arguments": call["arguments"]} for call in calls] == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in calls}) == len(calls)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == (
        whole["message"]["content"] or ""
    )


def test_openais_client_puts_the_pieces_together(client: openai.OpenAI) -> None:
    options: Any = {"model": "any", "messages": TWO, "tools": [TOOL], "max_tokens": 100}
    with client.chat.completions.stream(**options) as stream:
        arguments = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        answer = stream.get_final_completion().choices[0]
    assert [json.loads(call.function.arguments) for call in answer.message.tool_calls or []] == [
        {"city": "Oslo"},
        {"city": "Rome"},
    ]
    assert len(arguments) > 4 and "".join(arguments) == '{"city": "Oslo"}{"city": "Rome"}'


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_named_function_is_called_once(running: Running, choice: Any) -> None:
    answer = running.chat(messages=TWO, tools=[TOOL, ROOM], tool_choice=choice, max_tokens=100)[1]["choices"][0]
    cities = [json.loads(call["function"]["arguments"])["city"] for call in answer["message"]["tool_calls"]]
    assert cities == (["Oslo", "Rome"] if choice == "required" else ["Oslo"])
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("max_tokens", [4, 8, 12])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_says_length(running: Running, max_tokens: int, stream: bool) -> None:
    answer = running.chat(messages=OSLO, tools=[TOOL], max_tokens=max_tokens, stream=stream)[1]
    if stream:
        chunks = events(answer)
        choice = chunks[-1]["choices"][0]
        assert '{"city": "Oslo"}'.startswith("".join(call["arguments"] for call in collected(chunks)))
    else:
        choice = answer["choices"][0]
        assert "tool_calls" not in choice["message"] and "<tool_call>" in choice["message"]["content"]
        assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


def test_a_stream_begins_before_its_prompt_is_read() -> None:
    with serve(prefill_step_size=64, ram_budget="0") as running:
        long = [{"role": "user", "content": "heron " * 3000}]
        with connected(running, endless(running, messages=long, stream=True)) as connection:
            began = time.monotonic()
            head = connection.recv(2**16)
            while b"assistant" not in head:
                head += connection.recv(2**16)
            assert time.monotonic() - began < 2 and b" 200 " in head
            assert running.worker.gauges()["running_requests"] == 1


@pytest.mark.parametrize("interval", [0, 0.05])
def test_a_stream_shows_signs_of_life_while_tokens_are_not_sent(
    running: Running, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    """The call is not under a constraint here, so it is sent whole at its end."""
    monkeypatch.setattr(routes, "_KEEPALIVE_INTERVAL", interval)
    monkeypatch.setattr(chat_choice.ChatChoice, "_is_held", lambda _: False)
    text = running.chat(messages=OSLO, tools=[TOOL], max_tokens=60, stream=True)[1]
    before, _, _ = text.partition('"tool_calls"')
    assert before.count(": keepalive\n\n") >= (3 if interval == 0 else 1)
    assert [call["arguments"] for call in collected(events(text))] == ['{"city": "Oslo"}']


WARNING = "a call was not held to its schema to the end: too many expressions constructed"


@pytest.fixture(params=[3, 8, 14])
def released(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let llguidance fail after some tokens of a call."""
    masks, count = Constraint._mask, 0

    def fail(self: Constraint) -> Any:
        nonlocal count
        count += 1
        if count == request.param:
            self._release("too many expressions constructed")
            return None
        return masks(self)

    monkeypatch.setattr(Constraint, "_mask", fail)
    yield request.param


@pytest.mark.parametrize("stream", [False, True])
def test_a_released_constraint_is_in_the_reply(
    running: Running, released: int, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        answer = running.chat(messages=OSLO, tools=[TOOL], max_tokens=60, stream=stream)[1]
    if stream:
        *chunks, last = events(answer)
        assert not any("warnings" in chunk for chunk in chunks) and last["warnings"] == [WARNING]
        calls = collected([*chunks, last])
    else:
        assert answer["warnings"] == [WARNING]
        calls = [call["function"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert [call["arguments"] for call in calls] == ['{"city": "Oslo"}']
    assert [record.getMessage() for record in caplog.records].count(WARNING) == 1


def test_a_call_that_its_released_constraint_did_not_hold_is_checked(
    running: Running, released: int, caplog: pytest.LogCaptureFixture
) -> None:
    strict = json.loads(json.dumps(TOOL))
    strict["function"]["parameters"]["properties"]["city"] = {"type": "string", "maxLength": 3}
    answer = running.chat(messages=OSLO, tools=[strict], max_tokens=60)[1]
    assert answer["warnings"][0] == WARNING
    if released == 3:
        assert answer["warnings"][1].startswith("get_weather.city: ") and "too long" in answer["warnings"][1]
        assert "too long" in caplog.text


def test_an_answer_that_was_held_has_no_warnings(running: Running) -> None:
    for fields in ({}, {"tools": [TOOL]}, {"response_format": {"type": "json_object"}}):
        assert "warnings" not in running.chat(messages=OSLO, **fields)[1]
