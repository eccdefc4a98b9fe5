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

    def __call__(self, inputs: Sequence[mx.array], /) -> list[mx.array] | None:
        """Return the outputs for these inputs, lazily."""


class Kernels(Protocol):
    """The functions of ``native/``. All are lazy, take float32 vectors and accumulate in float32.

    Matrices are passed as ``weight, scales, biases``, with scales in float32, float16 or bfloat16. An argument of a
    wrong kind, shape or dtype raises TypeError or ValueError.
    """

    mlx_version: str

    def Chain(self, inputs: Sequence[mx.array], outputs: Sequence[mx.array], /) -> Chain:
        """Return a chain that computes ``outputs`` from ``inputs``. ValueError if another operation lies between."""

    def linear(
        self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, /
    ) -> mx.array:
        """Multiply vectors with one matrix; see :func:`flashmoe_mlx.ops.products.linear`."""

    def embed(
        self, numbers: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, /
    ) -> mx.array:
        """Return dequantized rows of a matrix, ``[..., columns]``, for row numbers ``[...]``, uint32."""

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
    ) -> mx.array:
        """Multiply vectors with routed matrices; see :func:`flashmoe_mlx.ops.products.matvec`."""

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
    ) -> mx.array:
        """Compute SwiGLU activations; see :func:`flashmoe_mlx.ops.products.gate_up`."""

    def attention(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool, /) -> mx.array:
        """Attend with softmax: ``[batch, heads, tokens, head_dim]`` to ``[batch, tokens, heads, head_dim]``."""

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
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Normalize and rotate; see :func:`flashmoe_mlx.ops.attention.norm_rope`."""

    def decode_attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float, /
    ) -> mx.array:
        """Attend from the last tokens; see :func:`flashmoe_mlx.ops.attention.decode_attention`."""

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
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Run a GatedDeltaNet between its projections; see :func:`flashmoe_mlx.ops.gated_delta.gated_delta`."""

    def rms_norm(self, x: mx.array, weight: mx.array, eps: float, /) -> mx.array:
        """Return the RMS norm of ``[..., dims]``."""

    def add_norm(self, x: mx.array, y: mx.array, weight: mx.array, eps: float, /) -> tuple[mx.array, mx.array]:
        """Add and normalize; see :func:`flashmoe_mlx.ops.norm.add_norm`."""

    def combine(
        self,
        x: mx.array,
        y: mx.array,
        scores: mx.array,
        shared: mx.array,
        weight: mx.array,
        eps: float,
        /,
    ) -> tuple[mx.array, mx.array]:
        """End a layer; see :func:`flashmoe_mlx.ops.norm.combine`."""

    def route(self, logits: mx.array, top_k: int, normalize: bool, /) -> tuple[mx.array, mx.array]:
        """Choose experts; see :func:`flashmoe_mlx.ops.routing.route`."""

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
    ) -> tuple[mx.array, mx.array]:
        """Compute router and shared expert; see :func:`flashmoe_mlx.ops.routing.router_and_shared`."""

    def instruction_set(self) -> str:
        """Return the instruction set in use, such as ``avx512``."""

    def choose_instruction_set(self, name: str, /) -> bool:
        """Use another instruction set, and return whether this CPU has it."""

    def threads(self) -> int:
        """Return the number of threads."""

    def set_threads(self, threads: int, /) -> None:
        """Set the number of threads; at most one per core is used."""


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
