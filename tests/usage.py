"""What loading and running a checkpoint takes, measured in a process of its own (Linux).

python -m tests.usage WARM_UP_FOLDER FOLDER RAM_BUDGET
"""

import json
import sys
from pathlib import Path

import mlx.core as mx

from tests.oracle import PROMPT, run, streamed


def main() -> None:
    """Print bytes read and peak memory growth as JSON."""
    warm_up, folder, ram_budget = sys.argv[1:]
    run(streamed(Path(warm_up)), tokens=2)  # imports and compiled kernels are not the checkpoint's
    mx.clear_cache()
    read, resident = _number("io", "rchar"), _number("status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    model = streamed(Path(folder), ram_budget=int(ram_budget))
    read = _number("io", "rchar") - read
    run(model, PROMPT, 20)
    usage = {
        "read": read,
        "peak": _number("status", "VmHWM") - resident,
        "trunk": model.streaming.trunk_nbytes,
        "slots": model.streaming.slots_nbytes,
        "experts": model.streaming.experts_nbytes,
    }
    print(json.dumps(usage))


def _number(file: str, key: str) -> int:
    """A number of bytes that the kernel keeps about this process."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            value, *unit = line.partition(":")[2].split()
            return int(value) * (1024 if unit else 1)
    raise KeyError(key)


if __name__ == "__main__":
    main()
