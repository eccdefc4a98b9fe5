"""Run Mixture-of-Experts models whose experts stay on disk, with MLX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe_mlx.model.load import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Importing mlx-lm takes a second, which `--help` and wrong arguments need not wait for.
    if name == "load":
        from flashmoe_mlx.model.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
