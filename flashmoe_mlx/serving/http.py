"""The server's door: HTTP, who may come in, and how much they may bring."""

import hmac
import ipaddress
import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from flashmoe_mlx.generation.job import Answer, Token
from flashmoe_mlx.generation.worker import WorkerClosed
from flashmoe_mlx.serving.errors import Refusal
from flashmoe_mlx.serving.openai.reply import Reply
from flashmoe_mlx.serving.openai.request import read_request
from flashmoe_mlx.serving.openai.schema import ChatRequest, CompletionRequest, Request
from flashmoe_mlx.serving.service import Service

MOST_BODY = 8 * 2**20  # bytes
MOST_HEADERS = 16 * 2**10  # bytes
MOST_CONNECTIONS = 128
_PATIENCE = 60  # seconds for a request to arrive, and for a client to take a part of its answer
_TICK = 0.25  # seconds between two looks whether the client is still there
_KEEPALIVE = 5  # seconds of silence in a stream
_LINGER = 2  # seconds that a client that is refused may still send
_RETRY = 5  # seconds that a client is asked to wait
_OFF = "Cross-origin requests are off."


class Server(ThreadingHTTPServer):
    """Listens on one address.

    Args:
        address (tuple[str, int]): host and port; port 0 takes any that is free.
        key (str, optional): what every request must bring. Default: ``None``, nothing.
        hosts (Collection[str]): names that the server is called by, besides its address.

    Attributes:
        service (Service): what answers.
    """

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS
    service: Service

    def __init__(self, address: tuple[str, int], key: str | None = None, hosts: Collection[str] = ()):
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self.key = key
        self.hosts = frozenset(host.lower() for host in hosts)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._answers = 0
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, if there are not too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            body = json.dumps(Refusal(503, f"{MOST_CONNECTIONS} connections are open already.").content()).encode()
            head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: {_RETRY}\r\n"
            request.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around each answer."""
        with self._lock:
            self._answers += 1
        try:
            yield
        finally:
            with self._lock:
                self._answers -= 1

    def wait_for_answers(self, patience: float) -> None:
        """Wait until every answer that has begun is sent, ``patience`` seconds at most."""
        deadline = time.monotonic() + patience
        while self._answers and time.monotonic() < deadline:
            time.sleep(0.02)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection ended with, without the client's data."""
        logging.exception("a connection ended with an error")


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    server_version = "flashmoe_mlx"
    sys_version = ""
    timeout = _PATIENCE
    server: Server

    def handle_one_request(self) -> None:
        """Read and answer a request, which must arrive in time, however slowly its bytes drip."""
        self._route, self._streams, self._body_is_read = "other", False, False
        self._arrival = threading.Timer(_PATIENCE, self._stop_reading)
        self._arrival.daemon = True
        self._arrival.start()
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True
        finally:
            self._arrival.cancel()

    def do_GET(self) -> None:
        """Health, metrics and the one model."""
        routes = {
            "/health": self._health,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            f"/v1/models/{self.server.service.name}": self._model,
        }
        self._answer(routes, {"/v1/chat/completions", "/v1/completions"})

    def do_POST(self) -> None:
        """Completions."""
        routes: dict[str, Callable[[], None]] = {
            "/v1/chat/completions": lambda: self._complete(ChatRequest),
            "/v1/completions": lambda: self._complete(CompletionRequest),
        }
        self._answer(routes, {"/health", "/metrics", "/v1/models"})

    def do_OPTIONS(self) -> None:
        """Refuse: browsers ask this before a cross-origin request."""
        self._refuse(Refusal(403, _OFF))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no HTTP that could be answered."""
        self.request_version = self.protocol_version  # it may not have been read
        self._refuse(Refusal(code, f"{message or 'The request cannot be read'}."))

    def log_message(self, format: str, *args: Any) -> None:
        """Log a line, with a stranger's characters escaped."""
        logging.info("%s %r", self.client_address[0], format % args)

    def _stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _health(self) -> None:
        if self.server.service.healthy:
            self._send(200, {"status": "ok"})
        else:
            self._send(503, {"status": "unavailable"})

    def _metrics(self) -> None:
        self._send(200, self.server.service.metrics(), "text/plain; version=0.0.4; charset=utf-8")

    def _models(self) -> None:
        self._send(200, {"object": "list", "data": [self.server.service.model()]})

    def _model(self) -> None:
        self._send(200, self.server.service.model())

    def _complete(self, kind: type[Request]) -> None:
        service = self.server.service
        request = read_request(kind, self._body(), service.defaults)
        reply, answer = service.start(request)
        try:
            if request.stream:
                self._stream(request, reply, answer)
            else:
                for token in self._tokens(answer):
                    if token is not None:
                        reply.add(token)
                    if reply.finished:
                        break
                self._send(200, reply.whole())
        finally:
            answer.cancel()

    def _stream(self, request: Request, reply: Reply, answer: Answer) -> None:
        """Send chunks as server-sent events. The status is chosen when the first one comes."""
        last = time.monotonic()
        try:
            for token in self._tokens(answer):
                if token is not None:
                    reply.add(token)
                    if chunk := reply.chunk():
                        self._event(json.dumps(chunk))
                        last = time.monotonic()
                elif time.monotonic() - last > _KEEPALIVE:
                    self._write_event(b": keepalive\n\n")
                    last = time.monotonic()
                if reply.finished:
                    break
        except Refusal as refusal:
            if not self._streams:
                raise
            self._event(json.dumps(refusal.content()))
            return
        if request.stream_options is not None and request.stream_options.include_usage:
            self._event(json.dumps(reply.usage_chunk()))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self._write_event(f"data: {data}\n\n".encode())

    def _write_event(self, event: bytes) -> None:
        if not self._streams:
            self._streams = True
            self._count(200)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")  # by which the client knows the end
            self.end_headers()
        self.wfile.write(event)

    def _tokens(self, answer: Answer) -> Iterator[Token | None]:
        """The tokens as they come, and ``None`` now and then, while the client is there.

        Raises:
            ConnectionError: it has gone.
            Refusal: the model failed.
        """
        try:
            for token in answer.tokens(_TICK):
                self._refuse_gone()
                yield token
        except ConnectionError:
            raise
        except WorkerClosed as error:
            raise Refusal(503, "The server is shutting down.") from error
        except Exception as error:
            logging.error("a generation failed: %s", error, exc_info=not isinstance(error, OSError | MemoryError))
            raise Refusal(500, f"The model failed: {' '.join(str(error).split())}") from error

    def _refuse_gone(self) -> None:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _answer(self, routes: Mapping[str, Callable[[], None]], others: Collection[str]) -> None:
        """Admit a request and take its route; whatever goes wrong, it gets its reason."""
        self._body_is_read = not {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}
        with self.server.answering():
            try:
                self._admit()
                self._route = self._known_route(routes, others)
                routes[self._route]()
            except Refusal as refusal:
                self._refuse(refusal)
            except (ConnectionError, TimeoutError):
                self._count(499)  # as proxies call a client that has gone
                self.close_connection = True
            except Exception:
                logging.exception("a request failed")
                self.close_connection = True
                if not self._streams:
                    self._refuse(Refusal(500, "An error of the server; its log says more."))

    def _known_route(self, routes: Collection[str], others: Collection[str]) -> str:
        """The path of a request, unless there is nothing or it is not for this method."""
        path = self.path.partition("?")[0]
        if path in others:
            raise Refusal(405, f"{self.command} is not for {path}.")
        if path not in routes:
            raise Refusal(404, "There is nothing here.")
        return path

    def _admit(self) -> None:
        """Refuse strangers, and who brings too many headers or the wrong key."""
        if sum(len(name) + len(value) for name, value in self.headers.items()) > MOST_HEADERS:
            raise Refusal(431, f"The headers have more than {MOST_HEADERS:,} bytes.")
        host = self.headers.get("Host", "")
        if len(self.headers.get_all("Host", [])) != 1 or _hostname(host) not in self._own_names():
            # A name can be made to point here by anybody (DNS rebinding), so only known ones are served.
            raise Refusal(403, "This Host is not served: use the address, or name it with --allowed-host.")
        if self.headers.get("Origin", f"//{host}").partition("//")[2] != host:
            raise Refusal(403, _OFF)
        if self.server.key is not None:
            scheme, _, key = self.headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode(errors="replace"), self.server.key.encode())
            if scheme.lower() != "bearer" or not same:
                raise Refusal(401, "The API key is missing or wrong.", code="invalid_api_key")

    def _own_names(self) -> set[str]:
        address = str(self.connection.getsockname()[0])
        loopback = {"localhost"} if ipaddress.ip_address(address).is_loopback else set()
        return {address, *loopback, *self.server.hosts}

    def _body(self) -> bytes:
        """The body of a request, unless it is too large, of unknown length, or does not arrive."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "One Content-Length is needed, and no Transfer-Encoding.")
        length = int(lengths[0])
        if length > MOST_BODY:
            raise Refusal(413, f"The body has {length:,} bytes, and this server takes {MOST_BODY:,}.")
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refusal(408, f"The body has {length:,} bytes, and {len(body):,} arrived within {_PATIENCE} s.")
        self._body_is_read = True
        self._arrival.cancel()
        return body

    def _refuse(self, refusal: Refusal) -> None:
        headers = {
            401: {"WWW-Authenticate": "Bearer"},
            405: {"Allow": "POST" if self.command == "GET" else "GET"},
            429: {"Retry-After": str(_RETRY)},
            503: {"Retry-After": str(_RETRY)},
        }
        self._send(refusal.status, refusal.content(), headers=headers.get(refusal.status, {}))

    def _send(
        self, status: int, content: Any, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        self._count(status)
        body = (content if isinstance(content, str) else json.dumps(content, allow_nan=False)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not self._body_is_read:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if not self._body_is_read:
            self._drain()

    def _drain(self) -> None:
        """Throw the rest of the request away: a client that still sends would lose the answer if it were cut off."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _LINGER
        self.connection.settimeout(_LINGER)
        with suppress(OSError):
            while time.monotonic() < deadline and self.rfile.read1(2**16):
                pass

    def _count(self, status: int) -> None:
        self.server.service.count(self._route, status)


def _hostname(host: str) -> str | None:
    """The name or address in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
