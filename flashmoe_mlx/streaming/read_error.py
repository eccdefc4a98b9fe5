"""The error of a read that did not complete."""

from collections.abc import Callable, Sequence

_Read = tuple[str, int, int, list[memoryview]]  # path, offset, bytes, and the buffers they go to

OnFilled = Callable[[Sequence[memoryview]], None]


class ReadError(OSError):
    """Bytes of a file that did not arrive as they should.

    Args:
        message (str): one line for people.
        path (str): the file.
        offset (int): where in the file the read began.
        wanted (int): its bytes.
        got (int): how many of them arrived. All of them, if the file is no longer the one that was opened.
    """

    def __init__(self, message: str, path: str, offset: int, wanted: int, got: int):
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.wanted = wanted
        self.got = got


def _failure(read: _Read, got: int, message: str) -> ReadError:
    path, offset, nbytes, _ = read
    return ReadError(message, path, offset, nbytes, got)
