"""OpenAI's client gets from the server what OpenAI's API promises."""

import json
from typing import Any

import jsonschema
import openai
import pytest

from demo.talk import TOOL
from flashmoe_mlx import generate
from tests.support.serving import DEFINITION, HERON, Messages, Running


def test_a_chat_request_gets_the_answer_of_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=HERON)
    assert answer.choices[0].message.content == DEFINITION
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "demo"
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 25)


def test_the_text_equals_that_of_generate(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Tell me a story about a sofa."
    generate.main(["--prompt", question, "--max-tokens", "30", "--verbose", "False"])
    messages: Messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="any", messages=messages, max_tokens=30)
    assert f"{answer.choices[0].message.content}\n" == capsys.readouterr().out


def test_a_stream_ends_with_usage_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=HERON, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == DEFINITION
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 25


def test_results_belong_to_their_calls_in_any_order(client: openai.OpenAI) -> None:
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


def test_a_stream_carries_whole_calls(client: openai.OpenAI) -> None:
    messages: Messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    chunks = list(
        client.chat.completions.create(model="any", messages=messages, tools=[TOOL], stream=True, max_tokens=60)
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.arguments) for call in calls if call.function] == [(0, '{"city": "Oslo"}')]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_parallel_tool_calls_there_is_one_call(client: openai.OpenAI) -> None:
    question: Messages = [{"role": "user", "content": "What is the weather in Oslo and in Rome?"}]
    options: Any = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 100}
    answer = client.chat.completions.create(model="any", messages=question, **options)
    calls = answer.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Oslo"}]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tool_choice_none_prevents_calls(client: openai.OpenAI) -> None:
    question: Messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    answer = client.chat.completions.create(model="any", messages=question, tools=[TOOL], tool_choice="none")
    assert not answer.choices[0].message.tool_calls and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
def test_a_required_call_fits_its_schema(client: openai.OpenAI, choice: Any) -> None:
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
    "properties": {
        "word": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["word", "legs"],
    "additionalProperties": False,
}


def test_json_fits_its_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "bird", "schema": SCHEMA, "strict": True}}
    chunks = client.chat.completions.create(
        model="any", messages=HERON, response_format=wanted, stream=True, max_tokens=60
    )
    jsonschema.validate(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), SCHEMA)


def test_json_object_gives_an_object(client: openai.OpenAI, running: Running) -> None:
    # The biases end first a string and then the object, as the model would not end either by itself.
    ends = {str(running.worker.tokenizer.encode(end)[0]): bias for end, bias in (('"', 100), ("}", 50))}
    answer = client.chat.completions.create(
        model="any",
        messages=HERON,
        response_format={"type": "json_object"},
        logit_bias=ends,
        max_tokens=60,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_stop_texts_end_an_answer_and_are_not_sent(client: openai.OpenAI) -> None:
    """A stop need not end where a token ends, and no text before it is lost."""
    answer = client.chat.completions.create(model="any", messages=HERON, stop=["xyz", "ding bi"])
    assert answer.choices[0].message.content == DEFINITION.partition("ding bi")[0]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="any", messages=HERON, stop=" bill!", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == DEFINITION


def test_logprobs_cover_the_text_whole_and_streamed(client: openai.OpenAI) -> None:
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
    sent = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or []]
    assert sent == whole.logprobs.content


def test_a_completion_continues_text_and_tokens_alike(client: openai.OpenAI, running: Running) -> None:
    text = "heron (noun):"
    answer = client.completions.create(model="any", prompt=text, max_tokens=8, logprobs=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and choice.logprobs and answer.usage.completion_tokens == 8
    assert choice.logprobs.tokens and len(choice.logprobs.tokens) == 8
    assert choice.logprobs.text_offset and choice.logprobs.text_offset[0] == 0
    tokens = running.worker.tokenizer.encode(text)
    again = client.completions.create(model="any", prompt=tokens, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in again) == choice.text


def test_a_seed_repeats_a_sample(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model="any",
            # Begins nothing that the model knows by heart.
            prompt="The",
            max_tokens=16,
            temperature=2,
            seed=seed,
            extra_body={"repetition_penalty": 1.1, "top_k": 500, "min_p": 0.0001},
        )
        return answer.choices[0].text

    assert sample(7) == sample(7) != sample(-8)


def test_penalties_and_biases_change_the_answer(client: openai.OpenAI, running: Running) -> None:
    token = running.worker.tokenizer.encode("heron")[0]
    answer = client.chat.completions.create(model="any", messages=HERON, max_tokens=5, logit_bias={str(token): -100})
    assert not (answer.choices[0].message.content or "").startswith("heron")
    answer = client.chat.completions.create(model="any", messages=HERON, extra_body={"repetition_penalty": 9})
    assert answer.choices[0].message.content != DEFINITION


def test_the_one_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "local"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_requests_of_mlx_lm_tests_are_accepted(running: Running) -> None:
    """They are copied from mlx-lm's tests of its server."""
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
