"""Errors that a client sees."""

from typing import Any


class Refusal(Exception):
    """A request that is not answered, and why.

    Args:
        status (int): of HTTP.
        message (str): for people.
        param (str, optional): the field that is wrong.
        code (str, optional): OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def content(self) -> dict[str, Any]:
        """The answer's body, shaped as OpenAI's errors are."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
