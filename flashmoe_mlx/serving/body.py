"""Bodies of requests: with a length or in chunks, plain or compressed, never more than a limit."""

import re
import zlib
from collections.abc import Iterator
from email.message import Message
from io import BufferedIOBase

from flashmoe_mlx.serving.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20

# Bytes of the line before a chunk, and of a trailer; and how many trailers there may be.
_MAX_LINE = 1024
_MAX_TRAILERS = 16
# zlib's code for the gzip format with its largest window.
_GZIP = 31


def read_body(stream: BufferedIOBase, headers: Message) -> bytes:
    """Read the body of a request, as it was sent.

    Args:
        stream (BufferedIOBase): The connection, after the headers.
        headers (Message): The headers.

    Raises:
        ApiError: The body is too large or incomplete, its length is unclear, or its framing is wrong.
    """
    lengths, codings = headers.get_all("Content-Length", []), headers.get_all("Transfer-Encoding", [])
    if codings and lengths:
        # Proxies disagree about which of them counts, which lets one request hide in another.
        raise ApiError(400, "Send either Content-Length or Transfer-Encoding, not both.")
    if codings:
        if [coding.strip().lower() for coding in codings] != ["chunked"]:
            raise ApiError(501, "The only Transfer-Encoding is chunked.")
        return b"".join(_chunks(stream))
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise ApiError(411, "Send exactly one Content-Length, or Transfer-Encoding: chunked.")
    length = int(lengths[0])
    if length > MAX_BODY_BYTES:
        raise _too_large(f"has {length:,} bytes")
    return _exactly(stream, length)


def decoded(body: bytes, headers: Message) -> bytes:
    """Return a body without its compression.

    Args:
        body (bytes): The body as it was sent.
        headers (Message): The headers.

    Raises:
        ApiError: The encoding is not supported, the data are damaged, or the content is too large.
    """
    encodings = [each.strip().lower() for each in headers.get_all("Content-Encoding", [])]
    if encodings in ([], ["identity"]):
        return body
    if encodings not in (["gzip"], ["x-gzip"]):
        raise ApiError(415, "The only Content-Encoding is gzip.", headers={"Accept-Encoding": "gzip"})
    member = zlib.decompressobj(_GZIP)
    try:
        content = member.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise ApiError(400, f"The body is not gzip: {error}.") from error
    if len(content) > MAX_BODY_BYTES:
        raise _too_large("is larger once decompressed")
    if not member.eof or member.unused_data:
        raise ApiError(400, "The body is not exactly one complete gzip member.")
    return content


def _chunks(stream: BufferedIOBase) -> Iterator[bytes]:
    """Yield the data of the chunks, up to the last one and its trailers."""
    total = 0
    while True:
        line = _line(stream)
        size = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\r\n]*)?", line)
        if size is None:
            raise ApiError(400, "A chunk of the body does not begin with its size.")
        length = int(size[1], 16)
        if length == 0:
            break
        total += length
        if total > MAX_BODY_BYTES:
            raise _too_large(f"has at least {total:,} bytes")
        yield _exactly(stream, length)
        if _line(stream):
            raise ApiError(400, "A chunk of the body is longer than its size.")
    for _ in range(_MAX_TRAILERS):
        if not _line(stream):
            return
    raise ApiError(400, f"The body has more than {_MAX_TRAILERS} trailers.")


def _line(stream: BufferedIOBase) -> bytes:
    line = stream.readline(_MAX_LINE)
    if line.endswith(b"\r\n"):
        return line[:-2]
    if len(line) == _MAX_LINE or line.endswith(b"\n"):
        raise ApiError(400, "The chunks of the body are malformed.")
    raise ApiError(408, "The body did not arrive completely in time.")


def _exactly(stream: BufferedIOBase, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise ApiError(408, f"The body did not arrive completely in time: {len(data):,} of {length:,} bytes.")
    return data


def _too_large(size: str) -> ApiError:
    return ApiError(413, f"The body {size}; the limit is {MAX_BODY_BYTES:,}.")
