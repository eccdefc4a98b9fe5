"""The native kernels of the CPU: whether they are there, and their types. What they compute is told in ops.py."""

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Protocol, cast

import mlx.core as mx


class Chain(Protocol):
    """Some of these functions in a row as one operation; of inputs in the shapes that it was made for."""

    def __call__(self, inputs: Sequence[mx.array], /) -> list[mx.array] | None: ...


class Kernels(Protocol):
    """The functions of ``native/``. All are lazy, take float32 vectors and add up in float32.

    Matrices are given as ``weight, scales, biases``, with scales in float32, float16 or bfloat16. Their errors are
    TypeErrors and ValueErrors: an argument of another kind, shape or dtype.
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

    def down(
        self,
        x: mx.array,
        slots: mx.array,
        scores: mx.array,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array,
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

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float, /
    ) -> mx.array: ...

    def delta_net(
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

    def ask(
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
    """The native kernels, or ``None`` where they were not built: then MLX's own operations serve, much slower."""
    try:
        module = cast(Kernels, import_module("flashmoe_mlx._native"))
    except ImportError as error:
        _advise(f"not built ({error})" if "_native" not in str(error) else "not built")
        return None
    # They use MLX's C++ classes, which change from one version to the next.
    if module.mlx_version != (running := version("mlx")):
        _advise(f"built for MLX {module.mlx_version}, and this is {running}")
        return None
    try:
        module.rms_norm(mx.ones((1,)), mx.ones((1,)), 0.0)
    except TypeError:  # arrays are no arrays to it
        _advise("built with another nanobind than MLX")
        return None
    return module


def _advise(what: str) -> None:
    if sys.platform != "linux":  # nothing is built there
        return
    warnings.warn(
        f"the native CPU kernels are {what}, and without them a CPU is some 20 times slower: "
        "with a C++20 compiler installed, run pip install again",
        stacklevel=3,
    )
