"""The native CPU kernels: loading them, and their types. The operations in this folder define what they compute."""

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Protocol, cast

import mlx.core as mx


class Chain(Protocol):
    """Several native operations as one. Returns ``None`` for inputs of other shapes than it was traced with."""

    def __call__(self, inputs: Sequence[mx.array], /) -> list[mx.array] | None: ...


class Kernels(Protocol):
    """The functions of ``native/``. All are lazy, take float32 vectors and accumulate in float32.

    Matrices are passed as ``weight, scales, biases``, with scales in float32, float16 or bfloat16. An argument of a
    wrong kind, shape or dtype raises TypeError or ValueError.
    """

    mlx_version: str

    def Chain(self, inputs: Sequence[mx.array], outputs: Sequence[mx.array], /) -> Chain: ...

    def linear(
        self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, /
    ) -> mx.array: ...

    def embed(
        self, numbers: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, /
    ) -> mx.array: ...

    def matvec(
        self,
        x: mx.array,
        slots: mx.array,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array,
        group_size: int,
        bits: int,
        /,
    ) -> mx.array: ...

    def gate_up(
        self,
        x: mx.array,
        slots: mx.array,
        gate_weight: mx.array,
        gate_scales: mx.array,
        gate_biases: mx.array,
        up_weight: mx.array,
        up_scales: mx.array,
        up_biases: mx.array,
        group_size: int,
        bits: int,
        /,
    ) -> mx.array: ...

    def attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool, /
    ) -> mx.array: ...

    def norm_rope(
        self,
        x: mx.array,
        q_norm: mx.array,
        k_norm: mx.array,
        position: mx.array,
        frequencies: mx.array,
        heads: int,
        key_heads: int,
        eps: float,
        /,
    ) -> tuple[mx.array, mx.array, mx.array]: ...

    def decode_attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float, /
    ) -> mx.array: ...

    def gated_delta(
        self,
        x: mx.array,
        window: mx.array,
        state: mx.array,
        taps: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        norm: mx.array,
        layout: Sequence[tuple[int, int]],
        eps: float,
        /,
    ) -> tuple[mx.array, mx.array, mx.array]: ...

    def rms_norm(self, x: mx.array, weight: mx.array, eps: float, /) -> mx.array: ...

    def add_norm(self, x: mx.array, y: mx.array, weight: mx.array, eps: float, /) -> tuple[mx.array, mx.array]: ...

    def combine(
        self,
        x: mx.array,
        y: mx.array,
        scores: mx.array,
        shared: mx.array,
        weight: mx.array,
        eps: float,
        /,
    ) -> tuple[mx.array, mx.array]: ...

    def route(self, logits: mx.array, top_k: int, normalize: bool, /) -> tuple[mx.array, mx.array]: ...

    def router_and_shared(
        self,
        x: mx.array,
        router_weight: mx.array,
        router_scales: mx.array,
        router_biases: mx.array,
        router_group_size: int,
        router_bits: int,
        gate_weight: mx.array,
        gate_scales: mx.array,
        gate_biases: mx.array,
        up_weight: mx.array,
        up_scales: mx.array,
        up_biases: mx.array,
        group_size: int,
        bits: int,
        /,
    ) -> tuple[mx.array, mx.array]: ...

    def instruction_set(self) -> str: ...

    def choose_instruction_set(self, name: str, /) -> bool: ...

    def threads(self) -> int: ...

    def set_threads(self, threads: int, /) -> None: ...


@cache
def kernels() -> Kernels | None:
    """Return the native kernels, or ``None`` if they cannot run here. On Linux the first such call warns once."""
    try:
        module = cast(Kernels, import_module("flashmoe_mlx._native"))
    except ImportError as error:
        _warn(f"not built ({error})" if "_native" not in str(error) else "not built")
        return None
    # They use MLX's C++ classes, which change between versions.
    if module.mlx_version != (running := version("mlx")):
        _warn(f"built for MLX {module.mlx_version}, and this is {running}")
        return None
    try:
        module.rms_norm(mx.ones((1,)), mx.ones((1,)), 0.0)
    except TypeError:
        # Another nanobind ABI: it does not recognize MLX's arrays.
        _warn("built with another nanobind than MLX")
        return None
    return module


def require() -> Kernels:
    """Return the native kernels where a backend was chosen that has them."""
    module = kernels()
    assert module is not None
    return module


def _warn(reason: str) -> None:
    # Other systems build none.
    if sys.platform != "linux":
        return
    warnings.warn(
        f"the native CPU kernels are {reason}; without them a CPU is about 20 times slower. "
        "Install a C++20 compiler and run pip install again",
        stacklevel=3,
    )
