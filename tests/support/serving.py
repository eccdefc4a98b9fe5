"""A server on a thread of this process, and clients that use and abuse it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from demo import MODEL
from flashmoe_mlx import load
from flashmoe_mlx.generation.worker import Worker
from flashmoe_mlx.serving.http import Server
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.routes import Handler
from flashmoe_mlx.serving.service import Limits, Service

Messages = list[ChatCompletionMessageParam]

CHAT = "/v1/chat/completions"
HERON: Messages = [{"role": "user", "content": "What is a heron?"}]
DEFINITION = "heron (noun): grey or white wading bird with long neck and long legs and (usually) long bill."
DEFAULTS = {"max_tokens": 40, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


class Running:
    """A running server, and ways to send it requests.

    Attributes:
        server (Server): The server.
        worker (Worker): Its worker.
        address (str): Its URL.
    """

    def __init__(self, server: Server, worker: Worker):
        self.server = server
        self.worker = worker
        self.address = f"http://127.0.0.1:{server.server_port}"

    def client(self, key: str = "none") -> OpenAI:
        """Return OpenAI's client of the server."""
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
        """Return status, headers, and the answer: JSON, or else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, response.headers, json.loads(text) if is_json and text else text

    def chat(self, **fields: Any) -> tuple[int, Any]:
        """Return status and answer of a chat request."""
        status, _, answer = self.ask("POST", CHAT, fields)
        return status, answer


@contextmanager
def serve(
    folder: Path = MODEL,
    *,
    key: str | None = None,
    hosts: tuple[str, ...] = (),
    most: int = 8192,
    max_queue: int = 16,
    prefix_cache_bytes: int = 10**9,
    ram_budget: str = "1GB",
    **options: Any,
) -> Iterator[Running]:
    """Load a model and serve it on a free port."""
    metrics = Metrics()
    worker = Worker(
        lambda: load(str(folder), ram_budget=ram_budget),
        metrics.add,
        max_queue,
        prefix_cache_bytes,
        **options,
    )
    with Server(("127.0.0.1", 0), Handler, key, hosts) as server:
        server.service = Service("demo", worker, metrics, Limits(most, most), DEFAULTS, {})
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield Running(server, worker)
        finally:
            server.shutdown()
            worker.close(0)


def endless(running: Running, **fields: Any) -> bytes:
    """Return the body of a request whose answer does not end by itself."""
    ends = {str(token): -100 for token in running.worker.tokenizer.eos_token_ids}
    return json.dumps({"messages": HERON, "max_tokens": 8000, "logit_bias": ends} | fields).encode()


@contextmanager
def connected(running: Running, body: bytes) -> Iterator[socket.socket]:
    """Yield a connection that has sent a chat request and has read nothing."""
    with socket.create_connection(("127.0.0.1", running.server.server_port), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        yield connection


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition, and fail if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_requests(running: Running, count: int) -> Callable[[], bool]:
    """Return the condition that ``count`` requests run or wait."""
    gauges = running.worker.gauges
    return lambda: gauges()["running_requests"] + gauges()["waiting_requests"] == count
