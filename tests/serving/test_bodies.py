"""Bodies of requests as HTTP/1.1 allows them, and the requests that have none."""

import gzip
import json
import socket
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest

from flashmoe_mlx.serving.body import MAX_BODY_BYTES
from tests.support.serving import CHAT, HERON, Running

# gzip writes the time into its header, and tests that run side by side must have the same names.
compressed = partial(gzip.compress, mtime=0)
BODY = json.dumps({"messages": HERON, "max_tokens": 2}).encode()


def raw(running: Running, head: str, body: bytes) -> tuple[int, Any]:
    """Send a request byte by byte as given; return status and answer."""
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n".encode() + body
        )
        answer = connection.makefile("rb").read()
    top, _, content = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(content)


def chunked(body: bytes, size: int, extension: bytes = b"") -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n"


@pytest.mark.parametrize(
    "body",
    [
        chunked(BODY, 1) + b"\r\n",
        chunked(BODY, 7, b";name=value") + b"\r\n",
        chunked(BODY, 10**4) + b"X-Sum: 7\r\n\r\n",
    ],
)
def test_a_body_in_chunks_is_read(running: Running, body: bytes) -> None:
    status, answer = raw(running, "Transfer-Encoding: chunked\r\n", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2


def test_a_connection_goes_on_after_a_body_in_chunks(running: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        connection.sendall(head + chunked(BODY, 20) + b"X: y\r\n\r\n" + last)
        answer = connection.makefile("rb").read()
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.endswith(b'{"status": "ok"}')


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n", 400),
        ("Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n", 501),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", 501),
        ("Transfer-Encoding: chunked\r\n", b"heron\r\n", 400),
        ("Transfer-Encoding: chunked\r\n", b"-1\r\n\r\n", 400),
        ("Transfer-Encoding: chunked\r\n", b"2\r\nherons\r\n0\r\n\r\n", 400),
        ("Transfer-Encoding: chunked\r\n", b"2\n{}\n0\n\n", 400),
        ("Transfer-Encoding: chunked\r\n", b"1;" + b"x" * 2000, 400),
        ("Transfer-Encoding: chunked\r\n", b"0\r\n" + b"A: b\r\n" * 100 + b"\r\n", 400),
        ("Transfer-Encoding: chunked\r\n", b"ffffffff\r\n", 413),
        ("Transfer-Encoding: chunked\r\n", chunked(bytes(MAX_BODY_BYTES + 1), 2**20), 413),
    ],
)
def test_malformed_chunks_are_refused(running: Running, head: str, body: bytes, status: int) -> None:
    answered, answer = raw(running, head, body)
    assert answered == status and answer["error"]["message"]


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity"])
def test_a_compressed_body_is_read(running: Running, encoding: str) -> None:
    body = BODY if encoding == "identity" else compressed(BODY)
    assert running.ask("POST", CHAT, body, {"Content-Encoding": encoding})[0] == 200
    head = f"Transfer-Encoding: chunked\r\nContent-Encoding: {encoding}\r\n"
    assert raw(running, head, chunked(body, 9) + b"\r\n")[0] == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", BODY, 415),
        ("gzip, gzip", compressed(compressed(BODY)), 415),
        ("gzip", BODY, 400),
        ("gzip", compressed(BODY)[:-4], 400),
        ("gzip", compressed(BODY) + b"!", 400),
        # A bomb: 64 MiB of zeros in 64 KiB.
        ("gzip", compressed(bytes(64 * 2**20)), 413),
        ("gzip", compressed(bytes(MAX_BODY_BYTES + 1)), 413),
    ],
)
def test_a_compressed_body_is_limited_too(running: Running, encoding: str, body: bytes, status: int) -> None:
    answered, _, answer = running.ask("POST", CHAT, body, {"Content-Encoding": encoding})
    assert answered == status and answer["error"]["message"]


def test_a_compressed_body_of_the_largest_size_is_read(running: Running) -> None:
    body = compressed(BODY + b" " * (MAX_BODY_BYTES - len(BODY)))
    assert running.ask("POST", CHAT, body, {"Content-Encoding": "gzip"})[0] == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/demo"])
def test_head_is_get_without_the_body(running: Running, path: str) -> None:
    status, headers, body = running.ask("HEAD", path)
    assert (status, body) == (200, "") and int(headers["Content-Length"]) > 0
    assert headers["Content-Type"] == running.ask("GET", path)[1]["Content-Type"]


@pytest.mark.parametrize(("path", "status"), [("/", 404), (CHAT, 405), ("/v1/models/other", 404)])
def test_head_of_what_cannot_be_read_has_a_status_alone(running: Running, path: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("name", ["my model", "50%", "50%25", "\u00c6ther/Qwen3.5 \U0001fab6", "a?b#c", 'quote"d\\'])
def test_a_model_is_found_by_the_id_that_the_list_gives(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.server.service, "name", name)
    assert running.ask("GET", "/v1/models")[2]["data"][0]["id"] == name
    for safe in ("", "/", "/:@"):
        status, _, answer = running.ask("GET", f"/v1/models/{quote(name, safe=safe)}")
        assert (status, answer["id"]) == (200, name)
    assert running.client().models.retrieve(name).id == name
    assert running.ask("GET", "/v1/models/demo")[0] == 404
    assert 'route="/v1/models/NAME"' in running.ask("GET", "/metrics")[2]


def test_a_model_is_found_by_plain_utf8(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.server.service, "name", "\u00c6ther")
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        request = "GET /v1/models/\u00c6ther HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")
