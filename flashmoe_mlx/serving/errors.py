"""Errors that a client sees."""

from collections.abc import Mapping
from typing import Any

# Seconds that a client of a busy server is asked to wait before it tries again.
_RETRY_AFTER = 5


class ApiError(Exception):
    """A request that is refused, and the reason.

    Args:
        status (int): HTTP status.
        message (str): the reason, for people.
        param (str, optional): name of the field that is wrong. Default: ``None``.
        code (str, optional): OpenAI's code of the error. Default: ``None``.
        headers (Mapping, optional): HTTP headers that belong to the status. Default: ``None``.

    Attributes:
        headers (dict): as given, and ``Retry-After`` where trying again may help.
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
