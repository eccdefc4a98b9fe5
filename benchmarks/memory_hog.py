"""Another process that holds memory, so that a small model is larger than the memory that is free."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_HOLD = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def memory_hog(leave: int) -> Iterator[int]:
    """Leave ``leave`` bytes of memory to everything else, page cache included (Linux only). Yields the bytes held."""
    nbytes = psutil.virtual_memory().available - leave
    if nbytes < 0:
        raise SystemExit(f"less than {leave / 1e9:.1f} GB of memory are free: ask to leave less")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "held\n":
            raise SystemExit(f"{nbytes / 1e9:.1f} GB of memory could not be held: ask to leave more")
        try:
            yield nbytes
            if process.poll() is not None:
                raise SystemExit("the process that held memory was killed: the figures are those of a larger machine")
        finally:
            process.kill()
