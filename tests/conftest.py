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
from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops import native as native_module
from tests.support.emulator import Emulated
from tests.support.families import FAMILIES
from tests.support.oracle import Run, resident, run

collect_ignore = ["support/golden/make_golden.py"]  # needs torch
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # kernels are compared with float32; MLX asks at its first product


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C reaches the commands that tests start, also where the tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def native() -> native_module.Kernels:
    """The native kernels run, as on any Linux with a compiler."""
    kernels = native_module.kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    return kernels


@pytest.fixture(autouse=True)
def twins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own operations run, unless a test asks for ``native``: what is streamed then has the bits of mlx-lm's."""
    if "native" not in request.fixturenames:
        monkeypatch.setattr(native_module, "kernels", lambda: None)


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
def expected() -> Callable[[Path], Run]:
    """What mlx-lm's own model does with a checkpoint."""
    return cache(lambda folder: run(resident(folder)))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels run in the emulator where a GPU would run them."""
    kernel = gpu.kernel.__wrapped__
    monkeypatch.setattr(gpu, "kernel", cache(lambda call: Emulated(kernel(call))))
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "on_nvidia", lambda: True)  # whose kernels are Metal's text, too
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    mx.disable_compile()  # a compiled function has no values that a program could be given
    yield
    mx.enable_compile()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels run on the GPU and find NaN where they write."""
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        pytest.skip("no GPU")
    kernel = gpu.kernel
    monkeypatch.setattr(gpu, "kernel", lambda call: partial(kernel(call), init_value=float("nan")))
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(mx.cpu)
