"""The parts that mlx_lm.server needs to answer with one streamed model: a provider and a request handler."""

import json
from typing import Any

from mlx_lm import server

_MOST_BODY = 8 * 2**20  # bytes of a request
_LOCAL = {"127.0.0.1", "localhost", "[::1]"}


class StreamedModel(server.ModelProvider):  # type: ignore[misc]
    """One model, whatever name a client asks for: a request never loads or downloads another."""

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        """The one model. Adapters and draft models that a request names are refused by :class:`Handler`."""
        return super().load("default_model")

    def _load(self, *key: Any) -> None:
        super()._load(*key)
        self.is_batchable = False  # one request at a time: a batch multiplies the experts in use


class Handler(server.APIHandler):  # type: ignore[misc]
    """mlx-lm's routes for clients on this machine only: no other Host, no foreign Origin, no huge bodies, no CORS."""

    def do_GET(self) -> None:
        """Answer a GET request."""
        if self._admitted():
            super().do_GET()

    def do_POST(self) -> None:
        """Answer a POST request."""
        if self._admitted():
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                self._refuse(411, "Content-Length is missing or is not a number.")
            elif len(length) > 12 or int(length) > _MOST_BODY:
                self._refuse(413, f"The request is larger than {_MOST_BODY} bytes.")
            else:
                super().do_POST()

    def do_OPTIONS(self) -> None:
        """Refuse: there is no CORS."""
        self._refuse(403, "Cross-origin requests are off.")

    def handle_models_request(self) -> None:
        """List the one model."""
        name = str(self.response_generator.cli_args.model)
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "local"}
        self._answer(200, {"object": "list", "data": [model]})

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks, and no adapter or draft model from a request."""
        for name in ("adapters", "draft_model"):
            if self.body.get(name) is not None:
                raise ValueError(f"{name} is not supported.")
        super().validate_model_parameters()

    def _set_cors_headers(self) -> None:
        """None."""

    def _admitted(self) -> bool:
        host = self.headers.get("Host", "")
        if (host if host.endswith("]") else host.rpartition(":")[0] or host) not in _LOCAL:
            self._refuse(403, "This Host is not served.")
        elif self.headers.get("Origin") not in (None, f"http://{host}"):
            self._refuse(403, "Cross-origin requests are off.")
        else:
            return True
        return False

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the body stays unread
        self._answer(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
