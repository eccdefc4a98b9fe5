"""Safetensors files, each of which breaks one rule of the format."""

import json
from collections.abc import Mapping
from typing import Any

GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
_U8 = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def shard(header: Mapping[str, Any] | str | bytes, data: bytes = b"12") -> bytes:
    """Return a file with this header."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """Return the entry of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype: str, shape: list[Any], begin: Any, end: Any, data: bytes = b"12") -> bytes:
    """Return a file with one tensor, ``a``."""
    return shard({"a": entry(dtype, shape, begin, end)}, data)


def no_entry(header: str, position: int = 1) -> tuple[bytes, str]:
    """Return a file whose header has no entry at ``position``, and the reason it is refused for."""
    excerpt = header[position : position + 40]
    entry = '"name": {"dtype": ..., "shape": ..., "data_offsets": ...}'
    return shard(header), f"at byte {position} of its header {excerpt!r} is not {entry}"


FILES = {
    # the length
    "empty": (b"", "it has 0 bytes, and a safetensors file begins with 8 that tell the header's length"),
    "7 bytes": (b"1234567", "it has 7 bytes, and a safetensors file begins with 8 that tell the header's length"),
    "a web page": (
        b"<!DOCTYPE html><title>404</title>",
        f"its header would have {int.from_bytes(b'<!DOCTYP', 'little')} bytes, and the format allows 100000000",
    ),
    "length of all ones": (b"\xff" * 8, f"its header would have {2**64 - 1} bytes, and the format allows 100000000"),
    "length one above the cap": (
        (10**8 + 1).to_bytes(8, "little"),
        "its header would have 100000001 bytes, and the format allows 100000000",
    ),
    "length at the cap": (
        (10**8).to_bytes(8, "little") + b"{}",
        "its header would have 100000000 bytes, and the file has only 10",
    ),
    "length one above the file": (
        (3).to_bytes(8, "little") + b"{}",
        "its header would have 3 bytes, and the file has only 10",
    ),
    "length zero": (bytes(8), "its header does not begin with {"),
    # UTF-8 and JSON
    "not JSON": (shard("nonsense"), "its header does not begin with {"),
    "blank first": (shard(f' {{"a":{_U8}}}'), "its header does not begin with {"),
    "byte order mark": (shard(b"\xef\xbb\xbf{}"), "its header does not begin with {"),
    "UTF-16": (shard("{}".encode("utf-16-be")), "its header does not begin with {"),
    "not UTF-8": (shard(b'{"\xff":1}'), "its header is not UTF-8 near byte 2"),
    "overlong UTF-8": (shard(b'{"\xc0\xaf":1}'), "its header is not UTF-8 near byte 2"),
    "surrogate in UTF-8": (shard(b'{"\xed\xa0\x80":1}'), "its header is not UTF-8 near byte 2"),
    "UTF-8 cut off": (shard(b'{"\xf0\x9f'), "its header is not UTF-8 near byte 2"),
    "half a surrogate pair": no_entry(rf'{{"\ud800":{_U8}}}'),
    "array": (shard("[]"), "its header does not begin with {"),
    "only a brace": no_entry("{"),
    "deeply nested": no_entry('{"a":' + "[" * 100_000),
    "deeply nested objects": no_entry('{"a":' * 20_000),
    "comma at the end": no_entry(f'{{"a":{_U8},}}', 53),
    "more after the end": no_entry(f'{{"a":{_U8}}}x'),
    "two objects": no_entry(f'{{"a":{_U8}}}{{"a":{_U8}}}'),
    "control character": no_entry(f'{{"\x01":{_U8}}}'),
    "comment": no_entry(f'{{/**/"a":{_U8}}}'),
    "text that JavaScript takes": no_entry("{a:1}"),
    # names
    "name twice": (shard(f'{{"a":{_U8},"a":{_U8}}}'), "its header has the name 'a' twice"),
    "name twice, once escaped": (shard(rf'{{"a":{_U8},"\u0061":{_U8}}}'), "its header has the name 'a' twice"),
    "name of 5,000 letters": no_entry('{"' + "a" * 5000 + f'":{_U8}}}'),
    "metadata that is a number": no_entry('{"__metadata__":7}'),
    "metadata with a number": no_entry('{"__metadata__":{"x":7}}'),
    "metadata twice": no_entry('{"__metadata__":{},"__metadata__":{}}', 19),
    "metadata that is a tensor": no_entry(f'{{"__metadata__":{_U8}}}'),
    "metadata that is an escaped tensor": no_entry(rf'{{"\u005f_metadata__":{_U8}}}'),
    "metadata with a key twice": (
        shard('{"__metadata__":{"x":"1","x":"2"}}', b""),
        "its metadata has the key 'x' twice",
    ),
    "metadata of 1,001 keys": (
        shard({"__metadata__": {str(key): "" for key in range(1001)}}, b""),
        "its metadata has more than 1000 keys, or one of more than 4096 bytes",
    ),
    # entries
    "entry is empty": no_entry('{"a":{}}'),
    "entry is null": no_entry('{"a":null}'),
    "entry is a list": no_entry('{"a":["U8",[2],[0,2]]}'),
    "no shape": no_entry('{"a":{"dtype":"U8","data_offsets":[0,2]}}'),
    "dtype twice": no_entry('{"a":{"dtype":"U8","dtype":"U8","data_offsets":[0,2]}}'),
    "comma before the first field": no_entry('{"a":{,"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'),
    "comma after the last field": no_entry('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],}}'),
    "a field too many": no_entry('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":1}}'),
    "dtype unknown": (one("F128", [1], 0, 16), "'a' has the dtype 'F128', which the format does not know"),
    "dtype of MLX": (one("bfloat16", [1], 0, 2), "'a' has the dtype 'bfloat16', which the format does not know"),
    # shapes
    "negative size": no_entry('{"a":{"dtype":"U8","shape":[-2],"data_offsets":[0,2]}}'),
    "fractional size": no_entry('{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}'),
    "size with leading zeros": no_entry('{"a":{"dtype":"U8","shape":[02],"data_offsets":[0,2]}}'),
    "size of 5,000 digits": no_entry('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,2]}}'),
    "65 dimensions": no_entry('{"a":{"dtype":"U8","shape":[1' + ",1" * 64 + '],"data_offsets":[0,1]}}'),
    "size beyond 64 bits": (
        one("U8", [0, 2**64], 0, 0, b""),
        f"the shape [0, {2**64}] of 'a' overflows 64 bits",
    ),
    "product that wraps around to 2": (
        one("U8", [2**32, 2**32 + 1, 2], 0, 2),
        f"the shape [{2**32}, {2**32 + 1}, 2] of 'a' overflows 64 bits",
    ),
    "product that wraps around in bytes": (
        one("F32", [2**62], 0, 0, b""),
        f"the shape [{2**62}] of 'a' overflows 64 bits",
    ),
    "product overflows before a zero": (
        one("U8", [2**63, 2, 0], 0, 0, b""),
        f"the shape [{2**63}, 2, 0] of 'a' overflows 64 bits",
    ),
    "more bytes than the shape": (one("U8", [1], 0, 2), "'a' has 2 bytes, and U8 [1] takes 1"),
    "fewer bytes than the shape": (one("F32", [2], 0, 2), "'a' has 2 bytes, and F32 [2] takes 8"),
    "half a byte": (one("F4", [3], 0, 2), "'a' has 2 bytes, and F4 [3] takes 1.5"),
    # offsets
    "offsets backwards": (one("U8", [2], 2, 0), "'a' has bytes 2 to 0, and the file has 2 after its header"),
    "offsets beyond the file": (one("U8", [2], 1, 3), "'a' has bytes 1 to 3, and the file has 2 after its header"),
    "offsets beyond 64 bits": (
        one("U8", [2], 2**64, 2**64 + 2),
        f"'a' has bytes {2**64} to {2**64 + 2}, and the file has 2 after its header",
    ),
    "three offsets": no_entry('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1,2]}}'),
    "overlap": (
        shard({"a": GOOD, "b": entry("U8", [2], 1, 3)}, b"123"),
        "'a' and 'b' overlap by 1 bytes",
    ),
    "two names for the same bytes": (shard({"a": GOOD, "b": GOOD}), "'a' and 'b' overlap by 2 bytes"),
    "nothing amid another tensor": (
        shard({"a": GOOD, "b": entry("U8", [0], 1, 1)}),
        "'a' and 'b' overlap by 1 bytes",
    ),
    "hole at the beginning": (one("U8", [2], 1, 3, b"123"), "no tensor has bytes 0 to 1 after its header"),
    "hole in the middle": (
        shard({"a": GOOD, "b": entry("U8", [1], 3, 4)}, b"1234"),
        "no tensor has bytes 2 to 3 after its header",
    ),
    "bytes after the last tensor": (
        one("U8", [2], 0, 2, b"123"),
        "no tensor has bytes 2 to 3 after its header",
    ),
    "cut off": (one("U8", [2], 0, 2, b"1"), "'a' has bytes 0 to 2, and the file has 1 after its header"),
}
"""By the fault: the bytes of a file, and the reason it is refused for."""

SOUND = {
    "nothing": shard("{}", b""),
    "one tensor": one("U8", [2], 0, 2),
    "a scalar": one("F64", [], 0, 8, b"12345678"),
    "nothing beside another tensor": shard({"a": GOOD, "b": entry("U8", [0], 2, 2)}),
    "two fours of bits": one("F4", [4], 0, 2),
    "not in order": shard({"b": entry("U8", [1], 2, 3), "a": GOOD}, b"123"),
    "metadata at the end": shard({"a": GOOD, "__metadata__": {"format": "mlx", "\U0001f600": "\n"}}),
    "MLX's metadata": shard({"__metadata__": None, "a": GOOD}),
    "white space": shard('{ "a" :\t{ "shape" : [ 2 ] ,\n"dtype":"U8", "data_offsets" : [ 0 , 2 ] } }   '),
}
"""Files that break no rule."""
