"""The text of a kernel as MLX gets it."""

from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx.ops import gpu, norm, products, routing
from flashmoe_mlx.system.package_data import data_dir

KERNELS = [norm._COMBINE, products._GATE_UP, routing._ROUTER_AND_SHARED]


@pytest.mark.parametrize("language", ["metal", "cuda"])
@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
def test_mlx_gets_code_without_comments(kernel: gpu.Kernel, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hashes the text at every launch."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: language == "cuda")
    monkeypatch.setattr(mx.fast, f"{language}_kernel", lambda **arguments: given.update(arguments), raising=False)
    gpu.compiled.__wrapped__(kernel)
    files = [f"{name}.metal" for name in (*kernel.uses, kernel.name)]
    if language == "cuda":
        files = ["cuda.h", *files]
    lines = [line for file in files for line in (data_dir("kernels") / file).read_text().splitlines()]
    code = [line.split("//")[0].rstrip() for line in lines]
    assert given["header"].splitlines() == [line for line in code if line]
    assert given["name"] == kernel.name
