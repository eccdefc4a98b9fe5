"""How a file of ``kernels/`` becomes a kernel of the GPU that is there, and how it is launched."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from flashmoe_mlx.system.package_data import data_dir

DEVICE_MEMORY = 8  # elements; MLX passes smaller arrays in constant memory, where the kernels expect no matrix


def on_gpu() -> bool:
    """Whether the kernels can run: MLX computes on a GPU, of whatever make."""
    found: bool = mx.default_device().type == mx.gpu
    return found


def on_nvidia() -> bool:
    """Whether that GPU is NVIDIA's."""
    return on_gpu() and mx.cuda.is_available()


class Call(NamedTuple):
    """What MLX makes a kernel of: the names of its operands, and a body that calls the function of its file.

    Args:
        name (str): of the kernel, and of its file.
        inputs (tuple): names of its inputs.
        body (str): Metal's words, or those that ``cuda.h`` knows as well.
        outputs (tuple): names of its outputs.
        uses (tuple): files that its own builds on.
    """

    name: str
    inputs: tuple[str, ...]
    body: str
    outputs: tuple[str, ...] = ("out",)
    uses: tuple[str, ...] = ("quantized",)


def run(
    call: Call,
    inputs: list[mx.array],
    shapes: list[tuple[int, ...]],
    *,
    dtypes: list[mx.Dtype] | None = None,
    threadgroups: tuple[int, int],
    simdgroups: int,
    template: dict[str, Any],
) -> list[mx.array]:
    """Run a kernel. Its outputs have the dtype of the first input, if ``dtypes`` does not say something else."""
    columns, rows = threadgroups
    return kernel(call)(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=dtypes or [inputs[0].dtype] * len(shapes),
        grid=(32 * simdgroups * columns, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        template=[("T", inputs[0].dtype), ("SIMDGROUPS", simdgroups), *template.items()],
    )


@cache
def kernel(call: Call) -> Callable[..., list[mx.array]]:
    """What launches a kernel; MLX compiles its text at the first launch."""
    folder = data_dir("kernels")
    text = "".join((folder / f"{file}.metal").read_text() for file in (*call.uses, call.name))
    if mx.cuda.is_available():
        text = (folder / "cuda.h").read_text() + text
        return mx.fast.cuda_kernel(  # type: ignore[return-value]
            name=call.name, input_names=call.inputs, output_names=call.outputs, source=call.body, header=text
        )
    return mx.fast.metal_kernel(  # type: ignore[return-value]
        name=call.name, input_names=call.inputs, output_names=call.outputs, source=call.body, header=text
    )
