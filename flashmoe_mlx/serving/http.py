"""HTTP front end: connection limits, authentication, Host and Origin checks, body limits."""

import hmac
import ipaddress
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from flashmoe_mlx.serving.body import decoded, read_body
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.service import Service

MAX_HEADER_BYTES = 16 * 2**10
MAX_CONNECTIONS = 128

# Seconds for a request to arrive completely, and for a client to accept a part of its answer.
_REQUEST_TIMEOUT = 60
# Seconds that a refused client may go on sending before its connection is closed.
_DRAIN_TIMEOUT = 2
_CROSS_ORIGIN = "Cross-origin requests are not allowed."


class Server(ThreadingHTTPServer):
    """Listens on one address, with a thread per connection.

    Args:
        address (tuple[str, int]): Host and port; port 0 takes any free one.
        handler (type[BaseHandler]): Answers the requests of one connection.
        key (str, optional): The API key that every request must send. Default: ``None``, no key.
        hosts (Collection[str]): Names that the Host header may give besides the server's address.

    Attributes:
        service (Service): The model that answers; set it before the first request.

    Raises:
        OSError: The address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS
    service: Service

    def __init__(
        self,
        address: tuple[str, int],
        handler: "type[BaseHandler]",
        key: str | None = None,
        hosts: Collection[str] = (),
    ):
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self.key = key
        self.hosts = frozenset(host.lower() for host in hosts)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._answers = 0
        try:
            super().__init__(address, handler)
        except OSError as error:
            host, port = address
            raise OSError(f"cannot listen on port {port} of {host}: {error.strerror}; choose another --port") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it when too many are open."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        error = ApiError(503, f"All {MAX_CONNECTIONS} connections are in use: try again later.")
        body = json.dumps(error.content()).encode()
        headers = {**error.headers, "Content-Type": "application/json", "Content-Length": len(body)}
        lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
        request.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count the enclosed block as an answer that :meth:`wait_for_answers` waits for."""
        with self._lock:
            self._answers += 1
        try:
            yield
        finally:
            with self._lock:
                self._answers -= 1

    def wait_for_answers(self, timeout: float) -> None:
        """Wait until every answer that has begun is sent, at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self._answers and time.monotonic() < deadline:
            time.sleep(0.02)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error that ended a connection, without the client's data."""
        logging.exception("a connection ended with an error")


class BaseHandler(BaseHTTPRequestHandler):
    """Admits the requests of one connection and sends their answers; a subclass has the routes.

    Attributes:
        route (str): Label of the request in the metrics; ``"other"`` until its path is known.
        streaming (bool): The answer is an event stream that has begun, so its status can no longer change.
    """

    protocol_version = "HTTP/1.1"
    server_version = "flashmoe_mlx"
    sys_version = ""
    timeout = _REQUEST_TIMEOUT
    server: Server

    def handle_one_request(self) -> None:
        """Read and answer one request, which must arrive in time however slowly its bytes trickle in."""
        self.route, self.streaming, self._body_is_read = "other", False, False
        self._arrival = threading.Timer(_REQUEST_TIMEOUT, self._stop_reading)
        self._arrival.daemon = True
        self._arrival.start()
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True
        finally:
            self._arrival.cancel()

    def do_OPTIONS(self) -> None:
        """Refuse the preflight that browsers send before a cross-origin request."""
        self.refuse(ApiError(403, _CROSS_ORIGIN))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that the standard library could not parse."""
        # The error may have come before the version was read.
        self.request_version = self.protocol_version
        self.refuse(ApiError(code, f"{message or 'The request cannot be parsed'}."))

    def log_message(self, format: str, *args: Any) -> None:
        """Log a line, with the client's characters escaped."""
        logging.info("%s %r", self.client_address[0], format % args)

    def respond(self, dispatch: Callable[[], None]) -> None:
        """Admit a request and call ``dispatch``; on any error, tell the client the reason."""
        self._body_is_read = not {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}
        with self.server.answering():
            try:
                self._admit()
                dispatch()
            except ApiError as error:
                self.refuse(error)
            except (ConnectionError, TimeoutError):
                # Proxies use this status for a client that closed its connection.
                self._count(499)
                self.close_connection = True
            except Exception:
                logging.exception("a request failed")
                self.close_connection = True
                if not self.streaming:
                    self.refuse(ApiError(500, "Internal server error: see the server's log."))

    def body(self) -> bytes:
        """Return the body of the request, decompressed.

        Raises:
            ApiError: It is too large or malformed, or it did not arrive in time.
        """
        body = read_body(self.rfile, self.headers)
        self._body_is_read = True
        self._arrival.cancel()
        return decoded(body, self.headers)

    def send(
        self, status: int, content: Any, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer; to a HEAD request, all but its body.

        Args:
            status (int): HTTP status.
            content (Any): Text, or what :func:`json.dumps` takes.
            kind (str): Its media type.
            headers (Mapping, optional): Further headers. Default: ``None``.
        """
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
        if self.command != "HEAD":
            self.wfile.write(body)
        if not self._body_is_read:
            self._drain()

    def send_event(self, event: bytes) -> None:
        """Send a part of an event stream; the first one sends the status and headers."""
        if not self.streaming:
            self.streaming = True
            self._count(200)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            # Without a length, the end of the connection is the end of the stream.
            self.send_header("Connection", "close")
            self.end_headers()
        self.wfile.write(event)

    def refuse(self, error: ApiError) -> None:
        """Send an error as the answer."""
        self.send(error.status, error.content(), headers=error.headers)

    def check_connection(self) -> None:
        """Raise a ConnectionAbortedError if the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _admit(self) -> None:
        """Raise an ApiError for oversized headers, a foreign Host or Origin, or a wrong key."""
        if sum(len(name) + len(value) for name, value in self.headers.items()) > MAX_HEADER_BYTES:
            raise ApiError(431, f"The headers have more than {MAX_HEADER_BYTES:,} bytes.")
        host = self.headers.get("Host", "")
        if len(self.headers.get_all("Host", [])) != 1 or _hostname(host) not in self._own_names():
            # Anybody can point a name of theirs at this address (DNS rebinding), so only known names are served.
            raise ApiError(403, "Unknown Host: use the server's address, or allow the name with --allowed-host.")
        if self.headers.get("Origin", f"//{host}").partition("//")[2] != host:
            raise ApiError(403, _CROSS_ORIGIN)
        if self.server.key is not None:
            scheme, _, key = self.headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode(errors="replace"), self.server.key.encode())
            if scheme.lower() != "bearer" or not same:
                message = "The API key is missing or wrong."
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _own_names(self) -> set[str]:
        address = str(self.connection.getsockname()[0])
        loopback = {"localhost"} if ipaddress.ip_address(address).is_loopback else set()
        return {address, *loopback, *self.server.hosts}

    def _drain(self) -> None:
        """Discard the rest of the request: closing while the client still sends would reset the connection."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _DRAIN_TIMEOUT
        self.connection.settimeout(_DRAIN_TIMEOUT)
        with suppress(OSError):
            while time.monotonic() < deadline and self.rfile.read1(2**16):
                pass

    def _stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _count(self, status: int) -> None:
        self.server.service.metrics.count_request(self.route, status)


def _hostname(host: str) -> str | None:
    """Return the name or address in a Host header, without its port, or ``None`` if it cannot be parsed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
