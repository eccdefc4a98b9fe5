"""Loading on a GPU checks every kernel that a decode step launches, and a faulty one is replaced."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.layers.fused_decoder import FusedDecoderLayer
from flashmoe_mlx.model.kernel_check import _compile_off, check_kernels
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import Backend
from tests.conftest import WriteFamily
from tests.model.test_exact import bits_per_projection
from tests.support.fused import steps
from tests.support.kernel_checks import FUSED_FAMILIES
from tests.support.operands import error, normal
from tests.support.oracle import mlx_lm_model, streamed

# CUDA has one kernel more than Metal, and the emulator runs it as well.
ON_CUDA = pytest.mark.parametrize("backend", [Backend.CUDA], ids=["cuda"], indirect=True)
KERNELS = {
    "gate_up": "gate_up",
    "matvec": "matvec",
    "gated_delta": "gated_delta",
    "norm_rope": "norm_rope",
    "attention_merge": "decode_attention",
    "router_and_shared": "router_and_shared",
    "route": "route",
    "add_norm": "add_norm",
    "combine": "combine",
}
"""Kernels of all GPUs, and their operations."""


class Launches:
    """Launches of kernels, one of which may be faulty."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faulty: str = "", fault: str = "") -> None:
        self.cases: set[tuple[Any, ...]] = set()
        compiled = gpu.compiled

        def observed(kernel: gpu.Kernel) -> Callable[..., list[mx.array]]:
            def launch(**options: Any) -> list[mx.array]:
                dtypes = tuple(each.dtype for each in options["inputs"])
                self.cases.add((kernel.name, dtypes, options["threadgroup"], *options["template"]))
                if kernel.name != faulty:
                    return compiled(kernel)(**options)
                if fault == "source":
                    return compiled(kernel._replace(body="undeclared();"))(**options)
                if fault == "raises":
                    raise RuntimeError("Thread group size (512) is greater than the maximum allowed threads (448)")
                shapes, output_dtypes = options["output_shapes"], options["output_dtypes"]
                return [normal(1, *s).astype(dtype) for s, dtype in zip(shapes, output_dtypes, strict=True)]

            return launch

        monkeypatch.setattr(gpu, "compiled", observed)

    def names(self) -> set[str]:
        return {name for name, *_ in self.cases}


def decode(model: nn.Module) -> mx.array:
    """Return the logits of a prompt's last token and of two decode steps."""
    return mx.concatenate([logits[:, -1] for logits in steps(model, make_prompt_cache(model), [9, 1, 1])])


@pytest.mark.parametrize("family", FUSED_FAMILIES)
@ON_CUDA
def test_every_kernel_is_checked(
    family: str, backend: Backend, emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step launches nothing but what was checked, and correct kernels cause no warning."""
    launches = Launches(monkeypatch)
    folder = checkpoint(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = streamed(folder)
    assert all(isinstance(layer, FusedDecoderLayer) for layer in model.layers)
    checked = launches.cases
    assert launches.names() == set(KERNELS) | {"attention_split", "linear"}
    launches.cases = set()
    decode(model)
    assert launches.cases == checked


@ON_CUDA
def test_mixed_bits_are_several_cases(
    backend: Backend, emulated: None, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        bits = 4 if ".layers.0." in path else 8
        return {"group_size": 64, "bits": bits} if path.endswith("_proj") else False

    launches = Launches(monkeypatch)
    model = streamed(checkpoint("qwen3_moe", predicate=predicate))
    checked = launches.cases
    assert sorted(dict(template)["BITS"] for _, _, _, *template in checked) == [4, 4, 8, 8]
    launches.cases = set()
    decode(model)
    assert launches.cases == checked


@pytest.mark.parametrize(
    ("faulty", "fault"),
    [("gate_up", "source"), ("attention_merge", "noise"), ("route", "noise"), ("combine", "raises")],
)
@ON_CUDA
def test_a_faulty_kernel_is_replaced(
    faulty: str,
    fault: str,
    backend: Backend,
    emulated: None,
    kernels_restored: None,
    checkpoint: WriteFamily,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint("qwen3_5_moe")
    wanted = decode(mlx_lm_model(folder))
    launches = Launches(monkeypatch, faulty, fault)
    with pytest.warns(UserWarning, match=f"^{KERNELS[faulty]} runs without its kernel, slower: on float32") as caught:
        model = streamed(folder)
    assert len(caught) == 1
    words = {"source": "undeclared", "noise": "differs", "raises": "raised RuntimeError: Thread group size (512)"}
    assert words[fault] in str(caught[0].message)
    launches.cases = set()
    actual = decode(model)
    assert faulty not in launches.names()
    assert error(actual, wanted) < 1e-5
    # For the process: another model does without it too, and nobody is warned again.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed(folder)


@pytest.mark.parametrize("backend", [Backend.METAL], ids=["metal"], indirect=True)
def test_settings_can_ask_for_no_kernels(
    backend: Backend, emulated: None, checkpoint: WriteFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_5_moe")
    launches = Launches(monkeypatch)
    file = tmp_path / "mine.toml"
    file.write_text("kernels = false\n")
    model = streamed(folder, config=file)
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in model.layers)
    assert mx.array_equal(decode(model), decode(mlx_lm_model(folder)))
    assert launches.cases == set()
    assert model.streaming.summary().endswith(", MLX operations alone")
    assert "MLX operations" not in streamed(folder).streaming.summary()


def test_compiled_functions_are_traced_again_afterwards() -> None:
    traced = []

    @mx.compile
    def function(x: mx.array) -> mx.array:
        traced.append(x)
        return x + 1

    def calls() -> int:
        traced.clear()
        mx.eval(function(mx.ones(3)), function(mx.ones(3)))
        return len(traced)

    try:
        assert calls() == 1
        with _compile_off():
            assert calls() == 2
        assert calls() == 0
        mx.disable_compile()
        with _compile_off():
            pass
        assert calls() == 2
    finally:
        mx.enable_compile()


@ON_CUDA
def test_a_check_changes_no_random_numbers(backend: Backend, emulated: None, checkpoint: WriteFamily) -> None:
    model = streamed(checkpoint("qwen3_moe"))
    mx.random.seed(5)
    wanted = mx.random.normal((4,))
    mx.random.seed(5)
    check_kernels(model, 4, backend)
    assert mx.array_equal(mx.random.normal((4,)), wanted)


@pytest.mark.metal
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_kernels_of_this_gpu_pass(family: str, dtype: mx.Dtype, on_gpu: Backend, checkpoint: WriteFamily) -> None:
    mixed = checkpoint("qwen3_moe", predicate=bits_per_projection, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed(checkpoint(family, dtype=dtype))
        streamed(mixed)


@pytest.mark.metal
@pytest.mark.parametrize("fault", ["source", "noise"])
@pytest.mark.parametrize("faulty", KERNELS)
def test_a_faulty_kernel_of_this_gpu_is_replaced(
    faulty: str,
    fault: str,
    on_gpu: Backend,
    kernels_restored: None,
    checkpoint: WriteFamily,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint("qwen3_5_moe")
    wanted = decode(mlx_lm_model(folder))
    Launches(monkeypatch, faulty, fault)
    with pytest.warns(UserWarning, match=f"^{KERNELS[faulty]} runs without its kernel") as caught:
        model = streamed(folder)
    assert len(caught) == 1
    actual = decode(model)
    assert mx.array_equal(mx.argmax(actual, axis=-1), mx.argmax(wanted, axis=-1))
    assert error(actual, wanted) < 1e-3
