"""The server under pressure: a full queue, clients that are slow or disconnect, a disk that fails."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from flashmoe_mlx.serving import http, routes
from tests.support.faults import faults
from tests.support.serving import CHAT, DEFINITION, HERON, Running, connected, endless, has_requests, serve, wait_until


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Yield a server with a queue of one and small prefill chunks."""
    with serve(max_queue=1, prefill_step_size=64, ram_budget="0") as running:
        yield running


def test_a_full_queue_refuses_and_recovers(running: Running) -> None:
    with connected(running, endless(running)), connected(running, endless(running)):
        wait_until(has_requests(running, 2))
        status, headers, answer = running.ask("POST", CHAT, {"messages": HERON})
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["Retry-After"]) > 0
        assert running.ask("GET", "/health")[0] == 200
    wait_until(lambda: running.worker.idle)
    assert running.chat(messages=HERON)[1]["choices"][0]["message"]["content"] == DEFINITION


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_ends_its_generation(running: Running, stream: bool) -> None:
    with connected(running, endless(running, stream=stream)) as connection:
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        wait_until(has_requests(running, 1))
    wait_until(lambda: running.worker.idle, 3)


def test_a_disconnected_client_ends_its_prefill(running: Running) -> None:
    long = [{"role": "user", "content": "heron " * 3500}]
    with connected(running, endless(running, messages=long)):
        wait_until(has_requests(running, 1))
    # The whole prefill would take much longer.
    wait_until(lambda: running.worker.idle, 3)


def test_a_slow_reader_does_not_delay_others(running: Running) -> None:
    with connected(running, endless(running, stream=True, max_tokens=20)):
        assert running.chat(messages=HERON)[0] == 200


def test_a_silent_stream_gets_keepalive_comments(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_KEEPALIVE_INTERVAL", 0)
    monkeypatch.setattr(routes, "_POLL_INTERVAL", 1e-3)
    long = [{"role": "user", "content": "heron " * 60}]
    with connected(running, endless(running, messages=long, stream=True, max_tokens=1)) as connection:
        text = connection.makefile("rb").read().decode()
    head, _, events = text.partition("\r\n\r\n")
    assert "text/event-stream" in head
    assert events.startswith(": keepalive\n\n") and events.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_read_ends_one_request_only(running: Running, stream: bool) -> None:
    with faults("error", 0.02, 1) as thrown:
        status, _, answer = running.ask("POST", CHAT, {"messages": HERON, "stream": stream, "seed": 1})
    assert thrown.count
    if status == 200:
        answer = json.loads(answer.removesuffix("\n\n").rpartition("data: ")[2])
    assert answer["error"]["type"] == "server_error" and "model.safetensors" in answer["error"]["message"]
    assert status == 500 or stream
    assert running.chat(messages=HERON)[1]["choices"][0]["message"]["content"] == DEFINITION


def test_a_body_that_does_not_arrive_times_out(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT", 0.3)
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 408")


def test_a_request_that_trickles_in_times_out(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT", 0.3)
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=10) as connection:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < begin + 10:
                connection.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() < begin + 5


def test_connections_beyond_the_limit_are_refused(running: Running) -> None:
    slots = running.server._connections
    taken = 0
    while slots.acquire(blocking=False):
        taken += 1
    status, headers, answer = running.ask("GET", "/health")
    slots.release(taken)
    assert status == 503 and headers["Retry-After"] and "128 connections" in answer["error"]["message"]
    wait_until(lambda: running.ask("GET", "/health")[0] == 200)
