"""The reader of headers against bytes that a fuzzer makes: ``make fuzz``, or

python -m tests.hostile.fuzz build/corpus -runs=5000000 -timeout=5 -malloc_limit_mb=64

The flags are libFuzzer's. The corpus begins with the hostile files. Each input is a header, and what it does not refuse
the safetensors library must take as well; a crash, any exception but ValueError, a hang or a large allocation ends it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flashmoe_mlx.header import check_header, check_length, entries
from tests.hostile.headers import FILES, SOUND

_SCRATCH = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"flashmoe_mlx.{os.getpid()}.safetensors"


def check_alike(header: bytes, data_nbytes: int) -> bool:
    """Check a header and, if it is taken, that the library takes it and sees the same tensors.

    Returns:
        bool: whether it was taken.

    Raises:
        AssertionError: the two do not agree.
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


def check_file(data: bytes) -> None:
    """Take the bytes of a file apart as read_header does; a file whose length lies is tried with the right one too."""
    length = int.from_bytes(data[:8], "little")
    try:
        check_length(length, len(data))
    except ValueError:
        length = len(data) - 8
    if length >= 0:
        check_alike(data[8 : 8 + length], len(data) - 8 - length)


def seed(corpus: Path) -> None:
    """Write the hostile files, and those that are sound, where the fuzzer begins."""
    corpus.mkdir(parents=True, exist_ok=True)
    for name, data in {**{name: data for name, (data, _) in FILES.items()}, **SOUND}.items():
        (corpus / name.replace(" ", "_").replace(",", "")).write_bytes(data)


def main(argv: Sequence[str]) -> None:
    """Fuzz until libFuzzer's flags say stop."""
    import atheris

    seed(Path(argv[1]))
    for function in ("check_length", "check_header", "entries"):
        globals()[function] = atheris.instrument_func(globals()[function])
    atheris.Setup(list(argv), check_file)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
