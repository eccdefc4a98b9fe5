"""The header of a safetensors file -> its tensors. Every rule of the format is checked before an object is made.

A header is a JSON object, ``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}``, so regular
that one expression matches an entry. Read entry by entry, a header that lies costs no more memory than its own bytes
once more; a general JSON parser would make objects of many times its size first.
"""

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

MOST_BYTES = 100_000_000
"""Of a header, as the format has it."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""How many a value has, by the format's name of its dtype."""

# The format sets no limits to these, but nobody's model comes near, and they keep small what one entry can cost.
_MOST_NAME_BYTES = 4096
_MOST_DIMENSIONS = 64
_MOST_METADATA = 1000

_PIECE = 1 << 16  # bytes that are decoded at once


class Entry(NamedTuple):
    """One tensor: bytes ``begin`` to ``end`` of what follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[int, Iterator[Entry]]:
    """Read and check the header of a file.

    Returns:
        tuple[int, Iterator[Entry]]: where in the file the tensors' bytes begin, and the tensors.

    Raises:
        ValueError: the file breaks a rule of the format, or is not complete.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            check_length(length, size)
            header = file.read(length)
        check_header(header, size - 8 - length)
        with safe_open(path, framework="np"):  # a second opinion, from the format's own library
            pass
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not complete: {error}. Download it again") from error
    return 8 + length, entries(header)


def check_length(length: int, size: int) -> None:
    """Refuse the length of a header that a file of ``size`` bytes cannot have, before anything of it is read.

    Raises:
        ValueError: that.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes, and a safetensors file begins with 8 that tell the header's length")
    if length > MOST_BYTES:
        raise ValueError(f"its header would have {length} bytes, and the format allows {MOST_BYTES}")
    if length > size - 8:
        raise ValueError(f"its header would have {length} bytes, and the file has only {size}")


def check_header(header: bytes, data_nbytes: int) -> None:
    """Check a header against every rule of the format. Takes about as much memory as the header once more.

    Args:
        header (bytes): what stands between the length and the tensors' bytes.
        data_nbytes (int): how many bytes follow it.

    Raises:
        ValueError: it is not UTF-8, not such a JSON object, or has a name twice; a dtype is unknown; a shape's product
            overflows or is not what the offsets span; offsets overlap, leave a hole, or do not end where the file does.
    """
    _check_utf8(header)
    hashes, begins, ends = array("q"), array("Q"), array("Q")
    for entry in entries(header):
        _check_entry(entry, data_nbytes)
        hashes.append(hash(entry.name))
        begins.append(entry.begin)
        ends.append(entry.end)
    _check_names(header, hashes)
    del hashes  # what follows needs the memory
    _check_cover(header, begins, ends, data_nbytes)


def entries(header: bytes) -> Iterator[Entry]:
    """The tensors of a header, in its order.

    Raises:
        ValueError: it is not a JSON object of such entries.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    if _EMPTY.match(header):
        return
    position, more, has_metadata = 1, True, False
    while more:
        match = _MEMBER.match(header, position)
        if match is None or match.end("name") - match.start("name") > _MOST_NAME_BYTES:
            raise ValueError(_malformed(header, position))
        name = json.loads(match["name"].decode())
        dtype, shape, begin, end = match.group("dtype", "shape", "begin", "end")
        if name == "__metadata__" and match.start("metadata") >= 0 and not has_metadata:
            _check_metadata(header, *match.span("metadata"))
            has_metadata = True
        elif name != "__metadata__" and dtype is not None and shape is not None and begin is not None:
            numbers = tuple(map(int, shape.split(b","))) if shape else ()
            yield Entry(name, dtype.decode(), numbers, int(begin), int(end))
        else:
            raise ValueError(_malformed(header, position))
        more = header[match.start("next")] == ord(",")
        position = match.end()


def _compile(pattern: str, **parts: str) -> re.Pattern[bytes]:
    """An expression over bytes in which a blank is any white space of JSON, and ``<part>`` another expression."""
    for name, part in parts.items():
        pattern = pattern.replace(f"<{name}>", part)
    return re.compile(pattern.replace(" ", r"[ \t\n\r]*+").encode())


# JSON's grammar. Nothing is tried twice (``++``, ``*+``), so that time and memory stay proportional to the header.
# A character beyond 16 bits is escaped as two halves; no half may stand alone.
_HALVES = r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = rf'\\(?:["\\/bfnrt]|u(?:{_HALVES}|(?![dD][89a-fA-F])[0-9a-fA-F]{{4}}))'
_STRING = rf'"(?:[^"\\\x00-\x1f]++|{_ESCAPE})*+"'
_NUMBER = r"(?:0|[1-9][0-9]{0,19})"
_FIELD = (
    r'(?:"dtype" : "(?P<dtype>\w{1,16})"'
    rf'|"shape" : \[ (?P<shape>(?:<number>(?: , <number>){{0,{_MOST_DIMENSIONS - 1}}}+)?+) \]'
    r'|"data_offsets" : \[ (?P<begin><number>) , (?P<end><number>) \])'
).replace("<number>", _NUMBER)
_EMPTY = _compile(r"\{ \} \Z")
_PAIR = _compile("(<string>) : <string>", string=_STRING)
_MEMBER = _compile(
    r" (?P<name><string>) :"
    r" (?:\{(?:(?:(?<=\{)|(?<!\{),) <field> ){3}+\}|(?P<metadata>null|\{ (?:<pair>(?: , <pair>)*+)?+ \}))"
    r" (?P<next>,|\} \Z)",
    field=_FIELD,
    pair=f"{_STRING} : {_STRING}",
    string=_STRING,
)


def _malformed(header: bytes, position: int) -> str:
    found = header[position : position + 40].decode(errors="replace")
    return (
        f'at byte {position} of its header {found!r} is not "name": {{"dtype": ..., "shape": ..., "data_offsets": ...}}'
    )


def _check_utf8(header: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(header)
    for begin in range(0, len(header), _PIECE):  # decoded at once, it could take four times its bytes
        try:
            decoder.decode(view[begin : begin + _PIECE], final=begin + _PIECE >= len(header))
        except UnicodeDecodeError as error:
            raise ValueError(f"its header is not UTF-8 near byte {begin + error.start}") from error


def _check_metadata(header: bytes, begin: int, end: int) -> None:
    keys: set[str] = set()
    for number, pair in enumerate(_PAIR.finditer(header, begin, end)):
        if number == _MOST_METADATA or pair.end(1) - pair.start(1) > _MOST_NAME_BYTES:
            raise ValueError(
                f"its metadata has more than {_MOST_METADATA} keys, or one of more than {_MOST_NAME_BYTES} bytes"
            )
        key = json.loads(pair[1].decode())
        if key in keys:
            raise ValueError(f"its metadata has the key {key!r} twice")
        keys.add(key)


def _check_entry(entry: Entry, data_nbytes: int) -> None:
    name, dtype, shape, begin, end = entry
    if dtype not in BITS:
        raise ValueError(f"{name!r} has the dtype {dtype!r}, which the format does not know")
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if max(size, bits) >= 1 << 64:
            raise ValueError(f"the shape {list(shape)} of {name!r} overflows 64 bits")
    if not begin <= end <= data_nbytes:
        raise ValueError(f"{name!r} has bytes {begin} to {end}, and the file has {data_nbytes} after its header")
    if bits != 8 * (end - begin):
        raise ValueError(f"{name!r} has {end - begin} bytes, and {dtype} {list(shape)} takes {bits / 8:.15g}")


def _check_names(header: bytes, hashes: "array[int]") -> None:
    """No name twice. Names may have the same hash, so those that do are read again."""
    ordered = np.sort(np.asarray(hashes))
    for repeated in ordered[1:][ordered[1:] == ordered[:-1]]:
        names = (entry.name for entry in entries(header) if hash(entry.name) == repeated)
        first, second = islice(names, 2)
        if first == second:
            raise ValueError(f"its header has the name {first!r} twice")


def _check_cover(header: bytes, begins: "array[int]", ends: "array[int]", data_nbytes: int) -> None:
    """Each byte belongs to one tensor: in order, each begins where the one before ends."""
    order = np.lexsort((np.asarray(ends), np.asarray(begins)))
    starts = np.append(np.asarray(begins)[order], np.uint64(data_nbytes))
    covered = np.insert(np.asarray(ends)[order], 0, np.uint64(0))
    wrong = np.flatnonzero(starts != covered)
    if not wrong.size:
        return
    rank = int(wrong[0])
    start, end = int(starts[rank]), int(covered[rank])
    if start > end:
        raise ValueError(f"no tensor has bytes {end} to {start} of those after its header")
    first, second = (next(islice(entries(header), int(number), None)).name for number in order[rank - 1 : rank + 1])
    raise ValueError(f"{first!r} and {second!r} overlap by {end - start} bytes")
