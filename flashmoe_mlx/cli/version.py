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
    """Return the device that MLX computes on by default, and for a CPU if its native kernels are available."""
    if mx.default_device().type == mx.gpu:
        return f"{'CUDA' if mx.cuda.is_available() else 'Metal'} ({mx.device_info()['device_name']})"
    kernels = native.kernels()
    if kernels is None:
        return "CPU without native kernels"
    return f"CPU with native kernels ({kernels.instruction_set()}, {kernels.threads()} threads)"
