"""Routes: the paths of the server and the functions that answer them.

An API of another dialect is a row in ``ROUTES`` and a folder beside ``openai/``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from flashmoe_mlx.generation.job import Answer, Token
from flashmoe_mlx.serving.errors import ApiError, worker_errors
from flashmoe_mlx.serving.http import BaseHandler
from flashmoe_mlx.serving.openai.reply import Choice, Reply
from flashmoe_mlx.serving.openai.request import read_request
from flashmoe_mlx.serving.openai.schema import ChatRequest, CompletionRequest, Request

# The path of a model is this and its name.
_MODEL_PREFIX = "/v1/models/"
# Seconds between two checks that the client is still connected.
_POLL_INTERVAL = 0.25
# Seconds without an event after which a stream sends a comment.
_KEEPALIVE_INTERVAL = 5


class Handler(BaseHandler):
    """Dispatches the requests of one connection to the functions of ``ROUTES``."""

    def do_GET(self) -> None:
        """Answer a GET request."""
        self.respond(self._dispatch)

    def do_HEAD(self) -> None:
        """Answer a HEAD request: as GET, without the body."""
        self.respond(self._dispatch)

    def do_POST(self) -> None:
        """Answer a POST request."""
        self.respond(self._dispatch)

    def complete(self, reply: Reply, stream: bool) -> None:
        """Send what is generated, as one answer or as an event stream.

        Args:
            reply (Reply): Has the answers and gives them the shape of an API.
            stream (bool): Send each part as soon as there is one.

        Raises:
            ApiError: The generation failed, or the server is shutting down, before anything was sent.
            ConnectionError: The client has disconnected.
        """
        if stream:
            self._stream(reply)
            return
        for _ in self._generate(reply):
            pass
        self.send(200, reply.whole())

    def _dispatch(self) -> None:
        path = self.path.partition("?")[0]
        found = self._find_route(path)
        if found is None:
            raise ApiError(404, f"Unknown path {path!r}.")
        label, route = found
        # HEAD is GET, and send() leaves the body out.
        if route.method != ("GET" if self.command == "HEAD" else self.command):
            allowed = {"Allow": "GET, HEAD" if route.method == "GET" else route.method}
            raise ApiError(405, f"{path} takes {route.method}, not {self.command}.", headers=allowed)
        self.route = label
        route.function(self)

    def _find_route(self, path: str) -> "tuple[str, Route] | None":
        """Return the route of a path, and its label in the metrics."""
        name = self.server.service.name
        # The standard library decodes the request line as Latin-1; clients write other characters and spaces with %.
        plain = unquote_to_bytes(path.encode("latin-1")).decode(errors="replace")
        if f"{_MODEL_PREFIX}{name}" in (plain, path):
            return f"{_MODEL_PREFIX}NAME", Route("GET", send_model)
        return (path, ROUTES[path]) if path in ROUTES else None

    def _stream(self, reply: Reply) -> None:
        """Send server-sent events. The status goes out at once, so that no proxy waits for it: errors are events."""
        self.send_event(reply.start_events())
        last = time.monotonic()
        try:
            for choice in self._generate(reply):
                events = reply.events(choice)
                # Tokens that are not sent, such as those of a call, are no sign of life.
                if not events and time.monotonic() - last > _KEEPALIVE_INTERVAL:
                    events = b": keepalive\n\n"
                if events:
                    self.send_event(events)
                    last = time.monotonic()
        except ApiError as error:
            self.send_event(reply.error_event(error))
            return
        self.send_event(reply.end_events())

    def _generate(self, reply: Reply) -> Iterator[Choice]:
        """Complete the choices of a reply one after the other.

        Yields:
            Choice: The current choice: after each token, after each ``_POLL_INTERVAL`` without one, and at its end.
        """
        for choice in reply.choices:
            for token in self._tokens(choice.answer):
                if token is not None:
                    choice.add(token)
                if choice.finish_reason is not None:
                    break
                yield choice
            # The next answer need not wait for the rest of this one.
            choice.answer.cancel()
            choice.end()
            yield choice

    def _tokens(self, answer: Answer) -> Iterator[Token | None]:
        """Yield tokens as they come, and ``None`` at least every ``_POLL_INTERVAL`` seconds.

        Raises:
            ApiError: The generation failed, or the server is shutting down.
            ConnectionError: The client has disconnected.
        """
        try:
            with worker_errors():
                for token in answer.tokens(_POLL_INTERVAL):
                    self.check_connection()
                    yield token
        except (ApiError, ConnectionError):
            raise
        except Exception as error:
            logging.error("a generation failed: %s", error, exc_info=not isinstance(error, OSError | MemoryError))
            raise ApiError(500, f"The model failed: {' '.join(str(error).split())}") from error


def send_health(handler: Handler) -> None:
    """Send the health of the server: status 200 while it accepts requests, else 503."""
    if handler.server.service.healthy:
        handler.send(200, {"status": "ok"})
    else:
        handler.send(503, {"status": "unavailable"})


def send_metrics(handler: Handler) -> None:
    """Send the metrics in Prometheus' text format."""
    handler.send(200, handler.server.service.metrics_text(), "text/plain; version=0.0.4; charset=utf-8")


def send_models(handler: Handler) -> None:
    """Send the list of the one model."""
    handler.send(200, {"object": "list", "data": [handler.server.service.model()]})


def send_model(handler: Handler) -> None:
    """Send the description of the one model."""
    handler.send(200, handler.server.service.model())


def complete_openai(handler: Handler, kind: type[Request]) -> None:
    """Generate the answer to a request of OpenAI's API."""
    service = handler.server.service
    request = read_request(kind, handler.body(), service.defaults)
    answers = service.start(request)
    try:
        reply = Reply(request, answers, service.tokenizer, service.vocabulary, service.name)
        handler.complete(reply, request.stream)
    except (ConnectionError, TimeoutError):
        service.metrics.add(cancelled=1)
        raise
    finally:
        for answer in answers:
            answer.cancel()


class Route(NamedTuple):
    """A method and the function that answers it."""

    method: str
    function: Callable[[Handler], None]


ROUTES = {
    "/health": Route("GET", send_health),
    "/metrics": Route("GET", send_metrics),
    "/v1/models": Route("GET", send_models),
    "/v1/chat/completions": Route("POST", partial(complete_openai, kind=ChatRequest)),
    "/v1/completions": Route("POST", partial(complete_openai, kind=CompletionRequest)),
}
