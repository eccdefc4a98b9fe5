"""GatedDeltaNet of a decode step, from its fused projections to the input of its output projection."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.dispatch import GPUS, Backend, Operation
from flashmoe_mlx.ops.norm import Norm

# SIMD groups that share the state of one head.
_SIMDGROUPS = 16

Layout = tuple[tuple[int, int], ...]
"""Columns of a row of projections: for queries, keys, values, output gates, betas and decays the first column of key
head 0, and the distance to the next key head's."""


class GatedDelta(NamedTuple):
    """Parameters of a GatedDeltaNet layer besides its projections.

    Args:
        taps (mx.array): Weight of the convolution, ``[channels, taps, 1]``.
        a_log (mx.array): Logarithm of each head's decay rate, ``[value_heads]``.
        dt_bias (mx.array): Added to the projected decay, ``[value_heads]``.
        norm (Norm): Of each value head, weight ``[value_dim]``.
        layout (Layout): Columns of the projections.
    """

    taps: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: Norm
    layout: Layout


def _native_serves(x: mx.array, window: mx.array, state: mx.array, layer: GatedDelta) -> bool:
    return x.dtype == mx.float32 and state.shape[-1] % 16 == 0


def _gpu_serves(x: mx.array, window: mx.array, state: mx.array, layer: GatedDelta) -> bool:
    _, _, value_dim, key_dim = state.shape
    return key_dim % 32 == 0 and value_dim % _SIMDGROUPS == 0


@Operation
def gated_delta(
    x: mx.array, window: mx.array, state: mx.array, layer: GatedDelta
) -> tuple[mx.array, mx.array, mx.array]:
    """Run convolution, gated delta rule and gated norm over a few tokens, as mlx-lm's layers do.

    Args:
        x (mx.array): Projections ``[1, tokens, width]``.
        window (mx.array): Queries, keys and values of the last tokens, ``[1, taps - 1, channels]``.
        state (mx.array): ``[1, value_heads, value_dim, key_dim]``, float32.
        layer (GatedDelta): The layer's parameters.

    Returns:
        tuple: ``[1, tokens, value_heads * value_dim]``, and the next window and state.
    """
    _, heads, value_dim, key_dim = state.shape
    key_heads = (layer.taps.shape[0] - heads * value_dim) // (2 * key_dim)
    share = heads // key_heads

    def columns(place: tuple[int, int], size: int) -> mx.array:
        starts = [place[0] + head * place[1] for head in range(key_heads)]
        return mx.concatenate([x[..., start : start + size] for start in starts], axis=-1)

    q, k, v, z, b, a = map(columns, layer.layout, (key_dim, key_dim, *[share * value_dim] * 2, share, share))
    inputs = mx.concatenate([window, mx.concatenate([q, k, v], axis=-1)], axis=1)
    convolved = nn.silu(mx.conv1d(inputs, layer.taps, groups=layer.taps.shape[0]))
    q, k, v = mx.split(convolved, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (each.reshape(1, -1, key_heads, key_dim) for each in (q, k))
    q, k = normalize_qk(q, k, inv_scale=key_dim**-0.5, eps=1e-6)
    v, z = (each.reshape(1, -1, heads, value_dim) for each in (v, z))
    y, next_state = gated_delta_update(q, k, v, a, b, layer.a_log, layer.dt_bias, state)
    normed = mx.fast.rms_norm(y, *layer.norm).astype(mx.float32) * nn.silu(z.astype(mx.float32))
    return normed.astype(x.dtype).flatten(2), inputs[:, -window.shape[1] :], next_state


@gated_delta.kernel(Backend.NATIVE, serves=_native_serves)
def _(x: mx.array, window: mx.array, state: mx.array, layer: GatedDelta) -> tuple[mx.array, mx.array, mx.array]:
    taps, a_log, dt_bias, norm, layout = layer
    return native.require().gated_delta(x, window, state, taps, a_log, dt_bias, norm.weight, layout, norm.eps)


@gated_delta.kernel(*GPUS, serves=_gpu_serves)
def _(x: mx.array, window: mx.array, state: mx.array, layer: GatedDelta) -> tuple[mx.array, mx.array, mx.array]:
    taps, a_log, dt_bias, norm, layout = layer
    _, heads, value_dim, key_dim = state.shape
    out, next_window, next_state = gpu.run(
        _GATED_DELTA,
        [x, mx.array(layout), window, state, taps, a_log, dt_bias, norm.weight, mx.array([norm.eps])],
        [(1, x.shape[1], heads * value_dim), window.shape, state.shape],
        dtypes=[x.dtype, x.dtype, mx.float32],
        threadgroups=(heads, 1),
        simdgroups=_SIMDGROUPS,
        template={
            "DK": key_dim,
            "DV": value_dim,
            "TAPS": taps.shape[1],
            "KEY_HEADS": (taps.shape[0] - heads * value_dim) // (2 * key_dim),
            "VALUE_HEADS": heads,
        },
    )
    return out, next_window, next_state


_GATED_DELTA = gpu.Kernel(
    "gated_delta",
    ("x", "layout", "window", "state", "taps", "a_log", "dt_bias", "norm", "eps"),
    """
    threadgroup float convolved[2 * DK + DV];
    threadgroup float read[DV];
    gated_delta<T, DK, DV, TAPS, KEY_HEADS, VALUE_HEADS, SIMDGROUPS>(
        x, layout, window, state, taps, a_log, dt_bias, norm, eps, out, next_window, next_state, convolved, read,
        x_shape[1], x_shape[2], threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ("out", "next_window", "next_state"),
)
