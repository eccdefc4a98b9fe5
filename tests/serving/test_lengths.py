"""Lengths of answers: as asked for, but not more than fits; without a number as much as fits."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from flashmoe_mlx.serving.service import Limits
from tests.support.serving import HERON, Running, endless, serve

# Tokens of the question about herons.
PROMPT = 20


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Yield a server without a default of max_tokens, with short limits."""
    with serve() as running:
        service = running.server.service
        service._limits = Limits(60, 12)
        service.defaults = service.defaults | {"max_tokens": None}
        yield running


def length(running: Running, **fields: Any) -> int:
    """Ask for an answer that would not end by itself, and return its length."""
    status, _, answer = running.ask("POST", "/v1/chat/completions", endless(running, **fields))
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    return int(answer["usage"]["completion_tokens"])


def limit_memory(running: Running, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let contexts of up to so many tokens fit in memory."""

    def refuse(context: int) -> None:
        if context > tokens:
            raise MemoryError("the KV cache is too large")

    monkeypatch.setattr(running.worker, "refuse_context", refuse)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 12}, 12),
        ({"max_tokens": 64000}, 12),
        ({"max_tokens": -1}, 12),
        ({"max_tokens": None}, 12),
        ({"max_tokens": None, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": -1}, 12),
    ],
)
def test_the_servers_limit_caps_what_is_asked_for(running: Running, asked: dict[str, Any], given: int) -> None:
    assert length(running, **asked) == given


def test_a_cap_is_logged(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        length(running, max_tokens=64000)
        length(running, max_tokens=-1)
        length(running, max_tokens=3)
    said = [record.getMessage() for record in caplog.records if record.name == "root"]
    assert said == ["max_tokens is 64000: the answer may have 12 tokens at most"]


@pytest.mark.parametrize("asked", [64000, 12, -1, None])
@pytest.mark.parametrize("fits", [PROMPT + 1, PROMPT + 3, PROMPT + 11])
def test_memory_caps_what_is_asked_for(
    running: Running, monkeypatch: pytest.MonkeyPatch, asked: int | None, fits: int
) -> None:
    limit_memory(running, monkeypatch, fits)
    assert length(running, max_tokens=asked) == fits - PROMPT


@pytest.mark.parametrize("asked", [-1, None])
def test_the_models_context_limits_an_answer_without_a_number(
    running: Running, monkeypatch: pytest.MonkeyPatch, asked: int | None
) -> None:
    monkeypatch.setattr(running.server.service, "_context_length", PROMPT + 4)
    assert length(running, max_tokens=asked) == 4
    # Who asks for more gets it.
    assert length(running, max_tokens=6) == 6


def test_the_models_context_is_that_of_its_config(running: Running) -> None:
    assert running.server.service._context_length == 2048


@pytest.mark.parametrize("fits", [0, 7, PROMPT])
def test_a_prompt_that_does_not_fit_in_memory_is_too_long(
    running: Running, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    limit_memory(running, monkeypatch, fits)
    status, answer = running.chat(messages=HERON)
    context = f"this model's maximum context length is {fits} tokens"
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["message"] == f"prompt is too long: {PROMPT} tokens > {fits} maximum; {context}"


def test_an_overflow_names_both_numbers(running: Running) -> None:
    for prompt in (["heron"] * 3, "heron " * 100):
        status, _, answer = running.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        if isinstance(prompt, list):
            assert status == 200
        else:
            assert (status, answer["error"]["param"]) == (400, "prompt")
            assert "tokens > 60 maximum; this model's maximum context length is 60 tokens" in answer["error"]["message"]
