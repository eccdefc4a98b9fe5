"""Schemas of strangers are checked without opening a URL, and in limited time."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from flashmoe_mlx.constrain import validate_call


def fault(parameters: Any, arguments: Any) -> str | None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return validate_call({"function": {"name": "f", "arguments": arguments}}, [tool])


@pytest.fixture
def address() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server of schemas, and the paths that are asked for."""
    asked: list[str] = []

    class Schemas(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "string"}')

    with HTTPServer(("127.0.0.1", 0), Schemas) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("reference", ["{}/a", "{}/a#/b", "file:///etc/hostname"])
def test_no_reference_is_fetched(address: tuple[str, list[str]], reference: str) -> None:
    url, asked = address
    for keyword in ("$ref", "$dynamicRef"):
        found = fault({"properties": {"a": {keyword: reference.format(url)}}}, {"a": 1})
        assert found is not None and "could not be checked" in found
    assert asked == []


SLOW = "^(a|a|aa)+$"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"pattern": SLOW}}},
        {"patternProperties": {SLOW: {}}},
        {"patternProperties": {SLOW: {}}, "additionalProperties": False},
        {"patternProperties": {SLOW: {}}, "unevaluatedProperties": False, "propertyNames": {"pattern": SLOW}},
    ],
)
def test_no_pattern_takes_long(schema: Any) -> None:
    text = "a" * 5000 + "b"
    began = time.monotonic()
    fault(schema, {"a": text, text: 1})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("schema", "arguments", "said"),
    [
        ({"properties": {"a": {"pattern": "^[0-9]+$"}}}, {"a": "12"}, None),
        ({"properties": {"a": {"pattern": "^[0-9]+$"}}}, {"a": "1x"}, "f.a: '1x' does not match '^[0-9]+$'"),
        ({"properties": {"a": {"pattern": "b"}}}, {"a": 3}, None),
        ({"patternProperties": {"^x": {"type": "integer"}}}, {"xy": 1, "y": "z"}, None),
        ({"patternProperties": {"^x": {"type": "integer"}}}, {"xy": "1"}, "f.xy: '1' is not of type 'integer'"),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, None),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"b": 1}, "f: 'b' is not a property"),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False}, {"x1": 1}, None),
        ({"additionalProperties": {"type": "integer"}}, {"b": "1"}, "f.b: '1' is not of type 'integer'"),
        ({"$defs": {"n": {"type": "null"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, {"a": None}, None),
        ({"$defs": {"n": {"type": "null"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, {"a": 1}, "f.a: 1 is not"),
    ],
)
def test_rules_are_those_of_json_schema(schema: Any, arguments: Any, said: str | None) -> None:
    found = fault(schema, arguments)
    assert found == said or (found is not None and said is not None and found.startswith(said))
