"""The versions and the backend that a run uses."""

import platform
from importlib.metadata import version

import mlx.core as mx

from flashmoe_mlx import __version__
from flashmoe_mlx.ops import native


def versions() -> str:
    """Return the versions of this package, MLX and mlx-lm, and the backend in use, one per line."""
    return "\n".join(
        (
            f"flashmoe_mlx {__version__}",
            f"MLX {version('mlx')}",
            f"mlx-lm {version('mlx-lm')}",
            f"Python {platform.python_version()}, {platform.platform(terse=True)}",
            f"backend: {backend()}",
        )
    )


def backend() -> str:
    """Return the device that MLX computes on by default, and for a CPU whether the native kernels are used."""
    name = mx.device_info().get("device_name", "unknown device")
    if mx.default_device().type == mx.gpu:
        return f"{'CUDA' if mx.cuda.is_available() else 'Metal'}, {name}"
    kernels = native.kernels()
    if kernels is None:
        return f"CPU, {name}, without native kernels"
    return f"CPU, {name}, with native kernels for {kernels.instruction_set()} on {kernels.threads()} threads"
