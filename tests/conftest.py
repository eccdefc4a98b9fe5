"""Tiny checkpoints and what mlx-lm computes from them, each made once per session."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.checkpoints import write_checkpoint
from flashmoe_mlx.model import load as load_module
from flashmoe_mlx.model import swap
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops import native as native_module
from flashmoe_mlx.ops.dispatch import Backend, choose_backend
from tests.support.emulator import Emulated
from tests.support.families import FAMILIES
from tests.support.kernel_checks import OPERATIONS
from tests.support.oracle import Run, resident, run

# The first needs torch. The second would turn this process into a Mac: doctests are collected by importing.
collect_ignore = ["support/golden/make_golden.py", "support/fake_mac.py"]
# Kernels are compared with float32. MLX reads this at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C reaches the commands that tests start, also where the tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend that models are loaded on: the product's choice, or the one a test is parametrized with."""
    chosen: Backend = getattr(request, "param", None) or choose_backend()
    if chosen is Backend.NATIVE and native_module.kernels() is None:
        pytest.skip("no native kernels")
    monkeypatch.setattr(load_module, "choose_backend", lambda kernels=True: chosen if kernels else Backend.REFERENCE)
    return chosen


@pytest.fixture
def native() -> native_module.Kernels:
    """The native kernels."""
    kernels = native_module.kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    return kernels


class WriteFamily(Protocol):
    """See :func:`checkpoint`."""

    def __call__(
        self,
        family: str,
        quantization: dict[str, Any] | None = ...,
        *,
        dtype: mx.Dtype = ...,
        predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = ...,
    ) -> Path: ...


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> WriteFamily:
    """Write a tiny random checkpoint, or find the one that an earlier test wrote. Do not change it."""
    folders: dict[str, Path] = {}

    def write(
        family: str,
        quantization: dict[str, Any] | None = {},  # noqa: B006 - empty means the family's usual one
        *,
        dtype: mx.Dtype = mx.float32,
        predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None,
    ) -> Path:
        if quantization == {}:
            quantization = {"mode": "mxfp4"} if family == "gpt_oss" else {"group_size": 64, "bits": 4}
        key = f"{family} {quantization} {dtype} {predicate}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            write_checkpoint(
                folders[key], FAMILIES[family], quantization=quantization, dtype=dtype, quant_predicate=predicate
            )
        return folders[key]

    return write


@pytest.fixture(scope="session")
def session_runs() -> dict[tuple[Path, Backend], Run]:
    """Runs of the oracle so far."""
    return {}


@pytest.fixture
def expected(backend: Backend, session_runs: dict[tuple[Path, Backend], Run]) -> Callable[[Path], Run]:
    """Return what the oracle does with a checkpoint."""

    def once(folder: Path) -> Run:
        if (folder, backend) not in session_runs:
            session_runs[folder, backend] = run(resident(folder))
        return session_runs[folder, backend]

    return once


@pytest.fixture
def kernels_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that the test disables are back after it."""
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "_kernels", dict(operation._kernels))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of the Metal backend run in the emulator."""
    compiled = gpu.compiled.__wrapped__
    monkeypatch.setattr(gpu, "compiled", cache(lambda kernel: Emulated(compiled(kernel))))
    # CUDA's kernels are the same source.
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    # It needs a driver, and host memory that a GPU can write to.
    monkeypatch.setattr(swap, "make_readback", lambda backend: None)
    # A compiled function has no values that the emulator could be given.
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Kernels run on the GPU, and find NaN where they write."""
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        pytest.skip("no GPU")
    compiled = gpu.compiled
    monkeypatch.setattr(gpu, "compiled", lambda kernel: partial(compiled(kernel), init_value=float("nan")))
    mx.set_default_device(mx.gpu)
    monkeypatch.setattr(load_module, "choose_backend", choose_backend)
    yield choose_backend()
    mx.set_default_device(mx.cpu)
