"""Reads the header of a safetensors file. Every rule of the format is checked, in little memory.

A header is a JSON object, ``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}``, so regular
that one regular expression matches an entry. Entries are checked one by one, so a header never takes more memory than
its own bytes once more, whatever is in it.

msgspec, which reads requests elsewhere, builds all objects before any of them can be checked. Of headers of 100 MB,
which the format allows, one with a shape of 50 million zeros takes 800 MB more and is refused here at its first byte; a
sound one of a million tensors takes 409 MB, and 43 MB here. Of two entries with one name, msgspec silently drops the
first. It takes 1.4 s for the sound header; this takes 3 s, or 0.03 s for each MB.
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

MAX_NBYTES = 100_000_000
"""Largest header that the safetensors format allows."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of a value, by the name of its dtype in the format."""

# The format does not limit these, but no model comes near, and they bound the memory of one entry.
_MAX_NAME_NBYTES = 4096
_MAX_DIMENSIONS = 64
_MAX_METADATA_KEYS = 1000

# Bytes that are decoded at once. All at once could take four times the header.
_DECODED_NBYTES = 1 << 16


class Entry(NamedTuple):
    """A tensor.

    Args:
        name (str): Its name.
        dtype (str): Its dtype, by the format's name.
        shape (tuple[int, ...]): Its shape.
        begin (int): First byte, counted from the end of the header.
        end (int): The byte after the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[int, Iterator[Entry]]:
    """Read and check the header of a file.

    Returns:
        tuple[int, Iterator[Entry]]: The offset in the file that the bytes of tensors begin at, and the tensors.

    Raises:
        ValueError: The file breaks a rule of the format, or is not complete.
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            check_length(length, size)
            header = file.read(length)
        check_header(header, size - 8 - length)
        # A second opinion, from the format's own library.
        with safe_open(path, framework="np"):
            pass
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not complete: {error}. Download it again") from error
    return 8 + length, entries(header)


def check_length(length: int, size: int) -> None:
    """Refuse a header of a length that is impossible in a file of ``size`` bytes, before the header is read.

    Raises:
        ValueError: The length is impossible.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes, and a safetensors file begins with 8 that tell the header's length")
    if length > MAX_NBYTES:
        raise ValueError(f"its header would have {length} bytes, and the format allows {MAX_NBYTES}")
    if length > size - 8:
        raise ValueError(f"its header would have {length} bytes, and the file has only {size}")


def check_header(header: bytes, data_nbytes: int) -> None:
    """Check a header against every rule of the format, in no more memory than its bytes once more.

    Args:
        header (bytes): The bytes between the length and the tensors.
        data_nbytes (int): Number of bytes that follow it.

    Raises:
        ValueError: It is not UTF-8, not such a JSON object, or has a name twice; a dtype is unknown; a shape overflows
            or does not match its offsets; offsets overlap, leave a gap, or do not end where the file does.
    """
    _check_utf8(header)
    hashes, begins, ends = array("q"), array("Q"), array("Q")
    for entry in entries(header):
        _check_entry(entry, data_nbytes)
        hashes.append(hash(entry.name))
        begins.append(entry.begin)
        ends.append(entry.end)
    _check_names(header, hashes)
    # The next check needs the memory.
    del hashes
    _check_cover(header, begins, ends, data_nbytes)


def entries(header: bytes) -> Iterator[Entry]:
    """Yield the tensors of a header, in its order.

    Raises:
        ValueError: It is not a JSON object of such entries.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    if _EMPTY.match(header):
        return
    position, more, has_metadata = 1, True, False
    while more:
        match = _MEMBER.match(header, position)
        if match is None or match.end("name") - match.start("name") > _MAX_NAME_NBYTES:
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
    """Compile an expression over bytes in which a blank matches JSON's white space, and ``<part>`` another one."""
    for name, part in parts.items():
        pattern = pattern.replace(f"<{name}>", part)
    return re.compile(pattern.replace(" ", r"[ \t\n\r]*+").encode())


# JSON's grammar. Possessive quantifiers (``++``, ``*+``) never backtrack, so time is proportional to the header.
# A character beyond 16 bits is escaped as a surrogate pair; no half of one may stand alone.
_HALVES = r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = rf'\\(?:["\\/bfnrt]|u(?:{_HALVES}|(?![dD][89a-fA-F])[0-9a-fA-F]{{4}}))'
_STRING = rf'"(?:[^"\\\x00-\x1f]++|{_ESCAPE})*+"'
_NUMBER = r"(?:0|[1-9][0-9]{0,19})"
_FIELD = (
    r'(?:"dtype" : "(?P<dtype>\w{1,16})"'
    rf'|"shape" : \[ (?P<shape>(?:<number>(?: , <number>){{0,{_MAX_DIMENSIONS - 1}}}+)?+) \]'
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
    for begin in range(0, len(header), _DECODED_NBYTES):
        try:
            decoder.decode(view[begin : begin + _DECODED_NBYTES], final=begin + _DECODED_NBYTES >= len(header))
        except UnicodeDecodeError as error:
            raise ValueError(f"its header is not UTF-8 near byte {begin + error.start}") from error


def _check_metadata(header: bytes, begin: int, end: int) -> None:
    keys: set[str] = set()
    for number, pair in enumerate(_PAIR.finditer(header, begin, end)):
        if number == _MAX_METADATA_KEYS or pair.end(1) - pair.start(1) > _MAX_NAME_NBYTES:
            raise ValueError(
                f"its metadata has more than {_MAX_METADATA_KEYS} keys, or one of more than {_MAX_NAME_NBYTES} bytes"
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
    """Refuse a name that occurs twice. Names with the same hash are compared, because they may still differ."""
    ordered = np.sort(np.asarray(hashes))
    for repeated in ordered[1:][ordered[1:] == ordered[:-1]]:
        names = (entry.name for entry in entries(header) if hash(entry.name) == repeated)
        first, second = islice(names, 2)
        if first == second:
            raise ValueError(f"its header has the name {first!r} twice")


def _check_cover(header: bytes, begins: "array[int]", ends: "array[int]", data_nbytes: int) -> None:
    """Refuse overlaps and gaps: in order of their offsets, each tensor must begin where the one before ends."""
    order = np.lexsort((np.asarray(ends), np.asarray(begins)))
    starts = np.append(np.asarray(begins)[order], np.uint64(data_nbytes))
    covered = np.insert(np.asarray(ends)[order], 0, np.uint64(0))
    wrong = np.flatnonzero(starts != covered)
    if not wrong.size:
        return
    rank = int(wrong[0])
    start, end = int(starts[rank]), int(covered[rank])
    if start > end:
        raise ValueError(f"no tensor has bytes {end} to {start} after its header")
    first, second = (next(islice(entries(header), int(number), None)).name for number in order[rank - 1 : rank + 1])
    raise ValueError(f"{first!r} and {second!r} overlap by {end - start} bytes")
