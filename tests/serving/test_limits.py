"""A server that is pressed: too many clients, slow ones, some that leave, a disk that fails, signals."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from flashmoe_mlx import server
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.serving import http as handler
from tests.serving.test_server import CHAT, DEFINITION, HERON
from tests.support.faults import faults
from tests.support.serving import Running, serve

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Few may wait; prompts are read in small chunks."""
    with serve(max_queue=1, prefill_step_size=64, ram_budget="0") as running:
        yield running


def endless(running: Running, **fields: Any) -> bytes:
    """The body of a request whose answer does not end by itself."""
    ends = {str(token): -100 for token in running.worker.tokenizer.eos_token_ids}
    return json.dumps({"messages": HERON, "max_tokens": 8000, "logit_bias": ends} | fields).encode()


@contextmanager
def connected(running: Running, body: bytes, headers: str = "") -> Iterator[socket.socket]:
    """A connection that has sent a request and reads nothing."""
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(head.encode() + body)
        yield connection


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_idle(running: Running) -> bool:
    return running.worker.idle


def runs(running: Running, requests: int) -> Callable[[], bool]:
    gauges = running.worker.gauges
    return lambda: gauges()["running_requests"] + gauges()["waiting_requests"] == requests


def test_the_queue_is_full(running: Running) -> None:
    with connected(running, endless(running)), connected(running, endless(running)):
        wait_until(runs(running, 2))
        status, headers, answer = running.ask("POST", CHAT, {"messages": HERON})
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["Retry-After"]) > 0
        assert running.ask("GET", "/health")[0] == 200
    wait_until(lambda: is_idle(running))
    assert running.chat(messages=HERON)[1]["choices"][0]["message"]["content"] == DEFINITION


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(running: Running, stream: bool) -> None:
    with connected(running, endless(running, stream=stream)) as connection:
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        wait_until(runs(running, 1))
    wait_until(lambda: is_idle(running), 3)


def test_a_client_that_leaves_while_its_prompt_is_read(running: Running) -> None:
    long = [{"role": "user", "content": "heron " * 3500}]
    with connected(running, endless(running, messages=long)):
        wait_until(runs(running, 1))
    wait_until(lambda: is_idle(running), 3)  # all of it would take much longer


def test_a_slow_reader_holds_up_nobody(running: Running) -> None:
    with connected(running, endless(running, stream=True, max_tokens=20)):
        assert running.chat(messages=HERON)[0] == 200


def test_silence_is_filled(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a prompt is read, comments tell a stream's client that the server is there."""
    monkeypatch.setattr(handler, "_KEEPALIVE", 0)
    long = [{"role": "user", "content": "heron " * 60}]
    with connected(running, endless(running, messages=long, stream=True, max_tokens=1)) as connection:
        text = connection.makefile("rb").read().decode()
    head, _, events = text.partition("\r\n\r\n")
    assert "text/event-stream" in head
    assert events.startswith(": keepalive\n\n") and events.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_read_that_fails(running: Running, stream: bool) -> None:
    """The request gets the reason, and the next one is answered."""
    with faults("error", 0.02, 1) as thrown:
        status, _, answer = running.ask("POST", CHAT, {"messages": HERON, "stream": stream, "seed": 1})
    assert thrown.count
    if status == 200:
        answer = json.loads(answer.removesuffix("\n\n").rpartition("data: ")[2])
    assert answer["error"]["type"] == "server_error" and "model.safetensors" in answer["error"]["message"]
    assert status == 500 or stream
    assert running.chat(messages=HERON)[1]["choices"][0]["message"]["content"] == DEFINITION


def test_a_body_that_never_ends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_PATIENCE", 0.3)
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 408")


def test_a_request_that_drips(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "_PATIENCE", 0.3)
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < begin + 10:
                connection.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() < begin + 5


NOISE = [b"\r\n", b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01"]


@pytest.mark.parametrize("noise", NOISE)
def test_noise(running: Running, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 ") and b'"error"' in answer)


def test_too_many_connections(running: Running) -> None:
    slots = running.server._connections
    taken = 0
    while slots.acquire(blocking=False):
        taken += 1
    status, headers, answer = running.ask("GET", "/health")
    slots.release(taken)
    assert status == 503 and headers["Retry-After"] and "128 connections" in answer["error"]["message"]
    wait_until(lambda: running.ask("GET", "/health")[0] == 200)


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


def test_a_preamble_is_read_once() -> None:
    """And what is said does not depend on it."""
    preamble = {"role": "system", "content": "You are a pocket dictionary. " * 6}
    with serve(min_prefix=32) as running, serve(min_prefix=32, prefix_cache_bytes=0) as forgetful:
        for word in ("heron", "sofa"):
            question = {"messages": [preamble, {"role": "user", "content": f"What is a {word}?"}], "max_tokens": 3}
            answer, expected = running.chat(**question)[1], forgetful.chat(**question)[1]
            assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            total = answer["usage"]["prompt_tokens"]
            assert cached == 0 if word == "heron" else total - 20 < cached < total
            assert expected["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_conversation_goes_on_where_it_was(running: Running) -> None:
    messages: list[dict[str, str]] = []
    for word in ("heron", "sofa"):
        messages.append({"role": "user", "content": f"What is a {word}?"})
        answer = running.chat(messages=messages)[1]
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 + 25  # question and answer


def test_a_quantised_cache() -> None:
    cache = {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 0}
    with serve(kv_cache=cache) as running:
        assert running.chat(messages=HERON)[1]["choices"][0]["message"]["content"] == DEFINITION
        turns = [*HERON, {"role": "assistant", "content": DEFINITION}]
        kept, _ = running.worker.prefixes.nearest(running.worker.tokenizer.apply_chat_template(turns))
        assert kept and any(isinstance(layer, QuantizedKVCache) for layer in kept)
        running.worker.close(0)
        assert running.ask("GET", "/health")[::2] == (503, {"status": "unavailable"})
        assert running.ask("POST", CHAT, {"messages": HERON})[0] == 503


def test_a_context_is_reckoned_as_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reckoned: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Streaming, "refuse_context", lambda _, *context: reckoned.append(context))
    with serve(kv_cache={"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}) as running:
        assert running.chat(messages=HERON, max_tokens=2)[0] == 200
    assert reckoned == [(20 + 2, 8, 32)]


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm(busy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An answer that takes too long is cancelled and told so; the process ends well."""
    monkeypatch.setattr(server, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told: list[str] = []

    def use() -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=50)
        try:
            client.models.list()
            if busy:
                options: Any = {"logit_bias": {"6135": -100, "6137": -100}, "max_tokens": 8000}
                stream = client.chat.completions.create(model="any", messages=HERON, stream=True, **options)
                next(iter(stream))
            os.kill(os.getpid(), signal.SIGTERM)
            if busy:
                list(stream)
        except openai.APIError as error:
            told.append(str(error))

    user = threading.Thread(target=use)
    user.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        server.main(["--port", str(port)])
    finally:
        signal.signal(signal.SIGTERM, before)
    user.join()
    assert told == (["The server is shutting down."] if busy else [])
    assert capsys.readouterr().out.startswith("Experts: ")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host", "0.0.0.0"], "needs --api-key-file"),
        (["--host", "0.0.0.0", "--api-key-file", "SHORT"], "16 ASCII characters"),
        (["--api-key-file", "nowhere"], "No such file"),
        (["--port", "70000"], "port is 70000"),
        (["--temp", "-1"], "temp is -1"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--model", "./nowhere"], "no such folder"),
        (["--chat-template-args", "[]"], "must be a JSON object"),
        (["--port", "TAKEN"], "Address already in use"),
    ],
)
def test_mistakes(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, running: Running
) -> None:
    (tmp_path / "key").write_text("short")
    known = {"SHORT": str(tmp_path / "key"), "TAKEN": str(running.server.server_port)}
    with pytest.raises(SystemExit) as stop:
        server.main([known.get(arg, arg) for arg in argv])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("error: ") and words in error
