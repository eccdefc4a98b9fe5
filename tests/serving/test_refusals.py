"""Requests that are refused: each gets its status and a reason that names what is wrong."""

import re
import socket
from typing import Any

import openai
import pytest

from demo.talk import TOOL
from flashmoe_mlx.serving.body import MAX_BODY_BYTES
from flashmoe_mlx.serving.routes import ROUTES, Route
from tests.support.serving import CHAT, HERON, Running, serve

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
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
def test_an_error_names_the_wrong_field(running: Running, fields: dict[str, Any], param: str | None) -> None:
    status, answer = running.chat(**{"messages": HERON} | fields)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    if param is None:
        assert next(iter(fields)) in answer["error"]["message"]
    else:
        assert str(answer["error"]["param"]).startswith(param), answer


@pytest.mark.parametrize(("prompt", "reason"), [("", "The prompt is empty."), ([99999], "99999 is not a token")])
def test_an_unusable_prompt_is_the_clients_error(running: Running, prompt: Any, reason: str) -> None:
    status, _, answer = running.ask("POST", "/v1/completions", {"prompt": prompt})
    assert (status, answer["error"]["param"]) == (400, "prompt") and answer["error"]["message"].startswith(reason)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": "\xff"}', b"[" * 100000, b'{"a": 1e999}'])
def test_a_body_that_is_not_a_json_object_is_refused(running: Running, body: bytes) -> None:
    status, _, answer = running.ask("POST", CHAT, body)
    assert status == 400 and answer["error"]["message"]


def test_a_prompt_beyond_the_limit_is_refused_in_words_that_clients_know(running: Running) -> None:
    status, answer = running.chat(messages=[{"role": "user", "content": "heron " * 10000}])
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    end = r"maximum; this model's maximum context length is 8192 tokens"
    assert re.fullmatch(rf"prompt is too long: \d+ tokens > 8192 {end}", error["message"])


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
        ("POST", "/v1/chat/completions", {"Transfer-Encoding": "gzip"}, 501),
        ("POST", "/v1/models/demo", {"Content-Length": "0"}, 405),
        ("GET", "/v1/models/other", {}, 404),
    ],
)
def test_foreign_requests_are_refused(
    running: Running, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answered, _, answer = running.ask(method, path, headers=headers)
    assert answered == status and answer["error"]["message"]


def test_a_client_that_sends_too_much_still_reads_the_reason(running: Running) -> None:
    assert running.ask("POST", CHAT, bytes(MAX_BODY_BYTES + 1))[0] == 413


def test_an_unknown_path_is_named(running: Running) -> None:
    status, _, answer = running.ask("GET", "/v1/foo?x=1")
    assert (status, answer["error"]["message"]) == (404, "Unknown path '/v1/foo'.")


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", CHAT, "POST"), ("POST", "/health", "GET, HEAD")])
def test_a_wrong_method_is_answered_with_the_right_one(running: Running, method: str, path: str, allowed: str) -> None:
    status, headers, answer = running.ask(method, path)
    assert (status, headers["Allow"]) == (405, allowed)
    assert answer["error"]["message"] == f"{path} takes {allowed.partition(',')[0]}, not {method}."


def test_a_row_of_the_table_is_a_route(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTES, "/v2/echo", Route("POST", lambda handler: handler.send(200, [handler.body().decode()])))
    assert running.ask("POST", "/v2/echo", b"heron")[::2] == (200, ["heron"])
    assert running.ask("GET", "/v2/echo")[0] == 405


NOISE = [b"\r\n", b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01"]


@pytest.mark.parametrize("noise", NOISE)
def test_bytes_that_are_not_http_get_an_error_or_nothing(running: Running, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 ") and b'"error"' in answer)


def test_a_key_covers_every_route() -> None:
    with serve(key=KEY, hosts=("mymac.local",)) as running:
        for path in ("/health", "/metrics", "/v1/models", CHAT, "/"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                status, _, answer = running.ask("POST" if path == CHAT else "GET", path, headers=headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError, match="API key"):
            running.client("wrong").models.list()
        assert running.client(KEY).models.list().data
        for host, status in (("mymac.local", 200), ("MyMac.local:8080", 200), ("other.local", 403)):
            assert running.ask("GET", "/health", headers={"Host": host, "Authorization": f"Bearer {KEY}"})[0] == status


def test_a_closed_worker_makes_the_server_unavailable() -> None:
    with serve() as running:
        running.worker.close(0)
        assert running.ask("GET", "/health")[::2] == (503, {"status": "unavailable"})
        status, headers, answer = running.ask("POST", CHAT, {"messages": HERON})
    assert (status, answer["error"]["message"]) == (503, "The server is shutting down.") and headers["Retry-After"]
