"""Errors that a client sees."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flashmoe_mlx.generation.worker import QueueFull, WorkerClosed

# Seconds that a client of a busy server is asked to wait before it tries again.
_RETRY_AFTER = 5


class ApiError(Exception):
    """A request that is refused, and the reason.

    Args:
        status (int): HTTP status.
        message (str): The reason, for people.
        param (str, optional): Name of the field that is wrong. Default: ``None``.
        code (str, optional): OpenAI's code of the error. Default: ``None``.
        headers (Mapping, optional): HTTP headers that belong to the status. Default: ``None``.

    Attributes:
        headers (dict): As given, and ``Retry-After`` where trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(_RETRY_AFTER)} if status in (429, 503) else {}
        self.headers |= headers or {}

    def content(self) -> dict[str, Any]:
        """Return the body of the answer, in the shape of OpenAI's errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@contextmanager
def bad_request(param: str) -> Iterator[None]:
    """Turn a ValueError of the enclosed block into status 400.

    Args:
        param (str): Name of the field that is wrong.

    Raises:
        ApiError: The request cannot be answered as it is.
    """
    try:
        yield
    except ValueError as error:
        raise ApiError(400, sentence(str(error)), param) from error


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the worker's refusals in the enclosed block into the statuses 429 and 503.

    Raises:
        ApiError: The queue is full, or the server is shutting down.
    """
    try:
        yield
    except QueueFull as error:
        message = f"{error.max_queue} requests are waiting already: try again later."
        raise ApiError(429, message, code="rate_limit_exceeded") from error
    except WorkerClosed as error:
        raise ApiError(503, "The server is shutting down.") from error


def sentence(message: str) -> str:
    """Return a message with a capital letter and a period; a field's name in front of it stays as it is."""
    if message.partition(" ")[0].isalpha():
        message = message[0].upper() + message[1:]
    return f"{message.removesuffix('.')}."
