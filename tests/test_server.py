"""The server as its clients meet it: OpenAI's own, strangers, and those that make mistakes."""

from collections.abc import Iterator

import pytest

from tests.serving import Running, serve

HERON = [{"role": "user", "content": "What is a heron?"}]
DEFINITION = "heron (noun): grey or white wading bird with long neck and long legs and (usually) long bill."


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serve() as running:
        yield running


def test_chat(running: Running) -> None:
    answer = running.client().chat.completions.create(model="gpt-4o", messages=HERON)
    assert answer.choices[0].message.content == DEFINITION
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "demo"
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 25)


def test_models(running: Running) -> None:
    assert [model.id for model in running.client().models.list()] == ["demo"]
    assert running.client().models.retrieve("demo").owned_by == "local"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Origin": "http://evil.example"}, 403),
        ("OPTIONS", "/v1/models", {}, 403),
        ("POST", "/v1/chat/completions", {"Content-Length": "99999999"}, 413),
        ("POST", "/v1/chat/completions", {"Content-Length": "-1"}, 411),
    ],
)
def test_strangers_are_refused(running: Running, method: str, path: str, headers: dict[str, str], status: int) -> None:
    answered, _, answer = running.ask(method, path, headers=headers)
    assert answered == status and answer["error"]["message"]
