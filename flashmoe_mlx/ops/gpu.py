"""GPU kernels: a source in ``kernels/`` is compiled for Metal or CUDA and launched through MLX."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from flashmoe_mlx.system.package_data import data_dir

DEVICE_MEMORY = 8
"""Elements from which on MLX passes an array in device memory. Kernels expect no matrix in constant memory."""


class Kernel(NamedTuple):
    """A kernel as MLX needs it: names of its operands, and a body that calls the function of its source file.

    Args:
        name (str): Name of the kernel, and of its file in ``kernels/``.
        inputs (tuple): Names of its inputs.
        body (str): Metal source; ``cuda.h`` defines the same words for CUDA.
        outputs (tuple): Names of its outputs.
        uses (tuple): Files that its own builds on.
    """

    name: str
    inputs: tuple[str, ...]
    body: str
    outputs: tuple[str, ...] = ("out",)
    uses: tuple[str, ...] = ("quantized",)


def run(
    kernel: Kernel,
    inputs: list[mx.array],
    shapes: list[tuple[int, ...]],
    *,
    dtypes: list[mx.Dtype] | None = None,
    threadgroups: tuple[int, int],
    simdgroups: int,
    template: dict[str, Any],
) -> list[mx.array]:
    """Launch a kernel, lazily.

    Args:
        kernel (Kernel): What to run.
        inputs (list[mx.array]): In the order of its input names.
        shapes (list[tuple]): Of the outputs.
        dtypes (list[mx.Dtype], optional): Of the outputs. Default: ``None``, the dtype of the first input.
        threadgroups (tuple[int, int]): Columns and rows of the grid.
        simdgroups (int): SIMD groups of 32 threads in a threadgroup.
        template (dict): Values of the source's template parameters besides ``T`` and ``SIMDGROUPS``.
    """
    columns, rows = threadgroups
    return compiled(kernel)(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=dtypes or [inputs[0].dtype] * len(shapes),
        grid=(32 * simdgroups * columns, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        template=[("T", inputs[0].dtype), ("SIMDGROUPS", simdgroups), *template.items()],
    )


@cache
def compiled(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """Return what launches a kernel. MLX compiles the source at the first launch."""
    folder = data_dir("kernels")
    files = [f"{file}.metal" for file in (*kernel.uses, kernel.name)]
    on_cuda = mx.cuda.is_available()
    text = "".join(_without_comments((folder / file).read_text()) for file in (["cuda.h"] if on_cuda else []) + files)
    make = mx.fast.cuda_kernel if on_cuda else mx.fast.metal_kernel
    return make(  # type: ignore[return-value]
        name=kernel.name, input_names=kernel.inputs, output_names=kernel.outputs, source=kernel.body, header=text
    )


def _without_comments(text: str) -> str:
    """Return a source without comments and blank lines: MLX hashes the whole text at every launch."""
    return re.sub(r"\n\s*\n", "\n", re.sub(r"[ \t]*//.*", "", text)).lstrip()
