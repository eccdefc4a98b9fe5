"""Text of files, of stdin and of arguments: Unicode, without a byte order mark."""

import sys
from collections.abc import Iterator
from pathlib import Path

_MARK = "\ufeff"
# Characters of an error that is shown.
_MAX_LENGTH = 400


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without the byte order mark that some editors put at its start.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(str(path), error.object[error.start]) from error


def read_stdin() -> str:
    """Return the text on stdin, as :func:`read_text` does that of a file.

    Raises:
        ValueError: It is not text in the encoding of the terminal.
    """
    return "".join(stdin_lines())


def stdin_lines() -> Iterator[str]:
    """Yield the lines on stdin as they arrive.

    Raises:
        ValueError: A line is not text in the encoding of the terminal.
    """
    try:
        for number, line in enumerate(sys.stdin):
            check_text("stdin", line)
            yield line.removeprefix(_MARK) if number == 0 else line
    except UnicodeDecodeError as error:
        raise _not_text("stdin", error.object[error.start]) from error


def check_text(name: str, text: str) -> None:
    """Refuse text with bytes in it that are no characters: Python keeps those of arguments as surrogates.

    Args:
        name (str): Where the text is from, for the message.
        text (str): The text.

    Raises:
        ValueError: It cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_text(name, ord(text[error.start]) & 0xFF) from error


def brief(error: BaseException) -> str:
    """Return the message of an error in one line, of which the middle is left out if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _MAX_LENGTH:
        return text
    return f"{text[: _MAX_LENGTH * 3 // 4]} ... {text[-_MAX_LENGTH // 4 :]}"


def _not_text(name: str, byte: int) -> ValueError:
    return ValueError(f"{name} is not UTF-8 text, it has the byte {byte:#04x}: convert it to UTF-8")
