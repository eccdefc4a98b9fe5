"""The versions and the backend that a run uses."""

import platform
from importlib.metadata import version

import mlx.core as mx

from flashmoe_mlx import __version__
from flashmoe_mlx.ops import native
from flashmoe_mlx.ops.dispatch import Backend, choose_backend


def versions() -> str:
    """Return the versions of this package, MLX and mlx-lm, and the backend in use, one per line."""
    return "\n".join(
        (
            f"flashmoe_mlx {__version__}",
            f"MLX {version('mlx')}",
            f"mlx-lm {version('mlx-lm')}",
            f"Python {platform.python_version()}, {platform.platform(terse=True)}",
            f"backend: {describe_backend()}",
        )
    )


def describe_backend() -> str:
    """Return the kernels that a model runs on, and the device."""
    backend = choose_backend()
    text = f"{backend.value} on {mx.device_info().get('device_name', 'an unknown device')}"
    if backend is Backend.NATIVE:
        kernels = native.require()
        text += f" ({kernels.instruction_set()}, {kernels.threads()} threads)"
    elif backend is Backend.REFERENCE:
        text += ", without native kernels"
    return text
