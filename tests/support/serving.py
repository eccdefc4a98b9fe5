"""A server of the demo model, with its model on a thread of this process."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from demo import MODEL
from flashmoe_mlx import load
from flashmoe_mlx.generation.worker import Generations
from flashmoe_mlx.serving.http import Server
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.service import Limits, Service

DEFAULTS = {"max_tokens": 40, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


class Running:
    """A server, and ways to ask it.

    Attributes:
        generations: the model's thread.
        address (str): of the server.
    """

    def __init__(self, server: Server, generations: Generations):
        self.server = server
        self.generations = generations
        self.address = f"http://127.0.0.1:{server.server_port}"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
        """Status, headers, and what JSON the answer has or else its text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, response.headers, json.loads(text) if is_json else text

    def chat(self, **fields: Any) -> tuple[int, Any]:
        """Status and answer of a chat request."""
        status, _, answer = self.ask("POST", "/v1/chat/completions", fields)
        return status, answer


@contextmanager
def serve(
    folder: Path = MODEL,
    *,
    key: str | None = None,
    hosts: tuple[str, ...] = (),
    most: int = 8192,
    most_waiting: int = 16,
    prefix_bytes: int = 10**9,
    ram_budget: str = "1GB",
    **options: Any,
) -> Iterator[Running]:
    """Load a model and serve it on a free port."""
    metrics = Metrics()
    generations = Generations(
        lambda: load(str(folder), ram_budget=ram_budget),
        metrics,
        most_waiting,
        prefix_bytes,
        **options,
    )
    with Server(("127.0.0.1", 0), key, hosts) as server:
        server.service = Service("demo", generations, metrics, Limits(most, most), DEFAULTS, {})
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield Running(server, generations)
        finally:
            server.shutdown()
            generations.close(0)
