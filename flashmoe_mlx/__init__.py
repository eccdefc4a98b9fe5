"""Run Mixture-of-Experts models whose experts stay on disk, with MLX."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe_mlx.config import Config
    from flashmoe_mlx.model.load import load
    from flashmoe_mlx.streaming.read_error import ReadError

__all__ = ["Config", "ReadError", "__version__", "load"]
__version__ = "0.1.0"

# MLX ends Metal's command buffers after 40 or 50 million elements of the arrays that they touch, and counts all slots
# of a layer when a kernel reads one. It reads this when it starts.
if sys.platform == "darwin":
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "1000")

_MODULES = {
    "Config": "flashmoe_mlx.config",
    "ReadError": "flashmoe_mlx.streaming.read_error",
    "load": "flashmoe_mlx.model.load",
}


def __getattr__(name: str) -> Any:
    # Imports are lazy because mlx-lm takes a second, which `flashmoe --help` need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
