"""Writes the Metal text of every kernel to files of a folder, for Apple's own compiler."""

import sys
from pathlib import Path

import pytest

from tests.msl.generated import DTYPES, generated

# MLX puts these headers of its own before every kernel.
PRELUDE = """#include "mlx/backend/metal/kernels/utils.h"
using namespace metal;
"""


def main() -> None:
    """Write a file for each text."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for dtype, name in DTYPES.items():
        for number, text in enumerate(generated(pytest.MonkeyPatch(), dtype, whole=False)):
            path = folder / f"{text.kernel}-{name}-{number}.metal"
            path.write_text(f"// {text}\n{PRELUDE}{text.source}")
    print(f"{len(list(folder.glob('*.metal')))} texts in {folder}")


if __name__ == "__main__":
    main()
