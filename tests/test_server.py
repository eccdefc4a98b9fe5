"""The handler's door, without a model behind it."""

import http.client
import json
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from flashmoe_mlx.server import Handler


@pytest.fixture
def ask():
    generator = SimpleNamespace(cli_args=SimpleNamespace(model="demo/model"), is_healthy=True)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, generator, system_fingerprint="test"))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def request(method, path, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", httpd.server_port, timeout=5)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    yield request
    httpd.shutdown()
    httpd.server_close()


def test_models_lists_the_one_model(ask):
    status, answer = ask("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["demo/model"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", {"Host": "evil.example"}, 403),
        ("GET", "/health", {"Origin": "http://evil.example"}, 403),
        ("OPTIONS", "/v1/models", {}, 403),
        ("POST", "/v1/chat/completions", {"Content_Length": "99999999"}, 413),
        ("POST", "/v1/chat/completions", {"Content_Length": "-1"}, 411),
    ],
)
def test_strangers_are_refused(ask, method, path, headers, status):
    answered, answer = ask(method, path, **headers)
    assert answered == status and answer["error"]["message"]
