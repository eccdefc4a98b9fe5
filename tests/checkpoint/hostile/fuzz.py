"""Fuzzes the reader of headers: ``make fuzz``, or the command below.

python -m tests.checkpoint.hostile.fuzz build/corpus -runs=5000000 -max_len=2048 -timeout=5 -malloc_limit_mb=64

The flags are libFuzzer's. The corpus begins with the hostile files. An input is one byte, for the size of the data, and
a header. The safetensors library must accept every header that the reader accepts, and see the same tensors. A
disagreement, an exception other than ValueError, a hang, or memory beyond twice the header ends the run.
"""

import os
import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import FunctionType

from safetensors import SafetensorError, safe_open

from flashmoe_mlx.checkpoint import header as parser
from flashmoe_mlx.checkpoint.header import check_header, check_length, entries
from tests.checkpoint.hostile.headers import FILES, SOUND

SLACK = 1 << 17
"""Bytes that even a small header takes: a piece of decoded text, and Python's own objects."""

# One input of this many is measured, because that is slow.
_MEASURED = 1 << 10
# Inputs between two reports, because libFuzzer never returns.
_REPORTED = 500_000
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[0-9]+|.', re.DOTALL)
_TOKENS = (
    *(b"%d" % number for number in (0, 1, 2, 8, 255, 2**32, 2**61, 2**63, 2**64 - 1, 2**64, 10**20)),
    *(b'"%s"' % dtype.encode() for dtype in ("BF16", "F32", "F4", "F6_E2M3", "F64", "F128")),
    *(b'"a"', rb'"\u0061"', b'"b"', rb'"\ud83d\ude00"', rb'"\ud800"', b'"__metadata__"', b'"dtype"', b'"shape"'),
    *(
        b'"data_offsets"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"null",
        b"-",
        b".5",
        b"e9",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(b"{}", b'"c":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"__metadata__":{"x":"y"},'),
)
_SCRATCH = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"flashmoe_mlx.{os.getpid()}.safetensors"


def check_alike(header: bytes, data_nbytes: int) -> bool:
    """Check a header and, if it is accepted, that the library accepts it and sees the same tensors.

    Returns:
        bool: The header was accepted.

    Raises:
        AssertionError: The two disagree.
    """
    try:
        check_length(len(header), 8 + len(header) + data_nbytes)
        check_header(header, data_nbytes)
    except ValueError:
        return False
    _SCRATCH.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_nbytes))
    try:
        with safe_open(_SCRATCH, framework="np") as file:
            ours = {entry.name: list(entry.shape) for entry in entries(header)}
            assert ours.keys() == set(file.keys())
            assert all(file.get_slice(name).get_shape() == shape for name, shape in ours.items())
    except SafetensorError as error:
        raise AssertionError(f"the library refuses {header!r}: {error}") from error
    finally:
        _SCRATCH.unlink()
    return True


def check_memory(header: bytes, data_nbytes: int) -> None:
    """Check that a header, itself included, takes no more than twice its bytes.

    Raises:
        AssertionError: It takes more.
    """
    tracemalloc.start()
    try:
        check_header(header, data_nbytes)
    except ValueError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < len(header) + SLACK, f"{peak} bytes for a header of {len(header)}"


def main(argv: Sequence[str]) -> None:
    """Fuzz as long as libFuzzer's flags say."""
    # Here, because it is in an extra of its own.
    import atheris

    counts = Counter[str]()

    def check(data: bytes) -> None:
        if not data:
            return
        counts["inputs"] += 1
        if check_alike(data[1:], data[0]):
            counts["taken"] += 1
        if counts["inputs"] % _MEASURED == 0:
            counts["measured"] += 1
            check_memory(data[1:], data[0])
        if counts["inputs"] % _REPORTED == 0:
            print(dict(counts), flush=True)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Mutate as libFuzzer does, or by whole tokens of JSON, which gets further into a parser."""
        random = Random(seed)
        if random.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        words = _TOKEN.findall(data[1:])
        for _ in range(random.randint(1, 3)):
            begin, source = random.randint(0, len(words)), random.randint(0, len(words))
            new = words[source : source + random.randint(0, 12)] if random.random() < 0.4 else [random.choice(_TOKENS)]
            words[begin : begin + random.choice((0, 1, 1, 1, 2, 8))] = new
        size = data[0] if data and random.random() < 0.8 else random.randint(0, 12)
        return (bytes([size]) + b"".join(words))[:most]

    corpus = Path(argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate([*(file for file, _ in FILES.values()), *SOUND.values()]):
        length = min(int.from_bytes(file[:8], "little"), max(0, len(file) - 8))
        (corpus / f"hostile-{number}").write_bytes(bytes([len(file[8 + length :])]) + file[8 : 8 + length])
    for function in vars(parser).values():
        if isinstance(function, FunctionType) and function.__module__ == parser.__name__:
            atheris.instrument_func(function)
    atheris.Setup(list(argv), check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
