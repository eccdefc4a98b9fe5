"""The Metal text that MLX generates for a launch of a kernel, on a machine without Metal."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx


def metal_text(kernel: Callable[..., list[mx.array]], inputs: Sequence[mx.array], **launch: Any) -> str:
    """Return the text; nothing is computed.

    Args:
        kernel (Callable): From ``mx.fast.metal_kernel``.
        inputs (Sequence[mx.array]): Of the launch. Only their shapes and dtypes matter.
        launch (Any): Its other arguments.
    """

    def traced(*arrays: mx.array) -> mx.array:
        return kernel(inputs=list(arrays), **launch, verbose=True)[0]

    printed = _printed(lambda: mx.export_function(lambda _: None, traced, *inputs))
    return printed[printed.index("```\n") + 4 : printed.rindex("\n```")]


def _printed(function: Callable[[], object]) -> str:
    """Return what `function` writes to standard output from C++, which bypasses Python's ``sys.stdout``."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            function()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        return file.read().decode()
