"""What lies between the products of Qwen3.5's and Qwen3-Next's layers: one function per kernel, and its twin.

See :mod:`flashmoe_mlx.ops.products`. The kernels take few tokens of one sequence and keep mlx-lm's shapes,
``[1, tokens, ...]``: a view of an array is no launch, but work for the host.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import native_kernels

_DELTA_SIMDGROUPS = 16  # that share a head's state


Layout = tuple[tuple[int, int], ...]
"""Where a row of projections has queries, keys, values, gates of the output, betas and decays: for each of these six
the first column of key head 0, and how many columns further the next key head has its own."""


def gated_delta(
    x: mx.array,
    window: mx.array,
    state: mx.array,
    taps: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    *,
    layout: Layout,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """A GatedDeltaNet layer between its projections: convolution, gated delta rule and gated norm of a few tokens.

    Args:
        x (mx.array): what is projected, ``[1, tokens, width]``.
        window (mx.array): queries, keys and values of the last tokens, ``[1, taps - 1, channels]``.
        state (mx.array): ``[1, value_heads, value_dim, key_dim]``, float32.
        taps (mx.array): the convolution's weight, ``[channels, taps, 1]``.
        a_log (mx.array): logarithm of a head's rate of decay, ``[value_heads]``.
        dt_bias (mx.array): added to the projected decay, ``[value_heads]``.
        norm (mx.array): weight of the norm, ``[value_dim]``.
        layout (tuple): where ``x`` has what; see :data:`Layout`.
        eps (float): of the norm.

    Returns:
        tuple: ``[1, tokens, value_heads * value_dim]``, and the next window and state.
    """
    _, heads, value_dim, key_dim = state.shape
    if key_dim % 16 == 0 and (kernels := native_kernels(x)):
        return kernels.delta_net(x, window, state, taps, a_log, dt_bias, norm, layout, eps)
    if not gpu.on_gpu() or key_dim % 32 or value_dim % _DELTA_SIMDGROUPS:
        return gated_delta_twin(x, window, state, taps, a_log, dt_bias, norm, layout=layout, eps=eps)
    template = {
        "DK": key_dim,
        "DV": value_dim,
        "TAPS": taps.shape[1],
        "KEY_HEADS": (taps.shape[0] - heads * value_dim) // (2 * key_dim),
        "VALUE_HEADS": heads,
    }
    out, next_window, next_state = gpu.run(
        _GATED_DELTA,
        [x, mx.array(layout), window, state, taps, a_log, dt_bias, norm, mx.array([eps])],
        [(1, x.shape[1], heads * value_dim), window.shape, state.shape],
        dtypes=[x.dtype, x.dtype, mx.float32],
        threadgroups=(heads, 1),
        simdgroups=_DELTA_SIMDGROUPS,
        template=template,
    )
    return out, next_window, next_state


def gated_delta_twin(
    x: mx.array,
    window: mx.array,
    state: mx.array,
    taps: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    *,
    layout: Layout,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`gated_delta` in MLX operations, as mlx-lm's layers compute it."""
    _, heads, value_dim, key_dim = state.shape
    key_heads = (taps.shape[0] - heads * value_dim) // (2 * key_dim)
    share = heads // key_heads

    def part(place: tuple[int, int], size: int) -> mx.array:
        starts = [place[0] + head * place[1] for head in range(key_heads)]
        return mx.concatenate([x[..., start : start + size] for start in starts], axis=-1)

    q, k, v, z, b, a = map(part, layout, (key_dim, key_dim, *[share * value_dim] * 2, share, share))
    inputs = mx.concatenate([window, mx.concatenate([q, k, v], axis=-1)], axis=1)
    convolved = nn.silu(mx.conv1d(inputs, taps, groups=taps.shape[0]))
    q, k, v = mx.split(convolved, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (each.reshape(1, -1, key_heads, key_dim) for each in (q, k))
    q, k = normalize_qk(q, k, inv_scale=key_dim**-0.5, eps=1e-6)
    v, z = (each.reshape(1, -1, heads, value_dim) for each in (v, z))
    y, next_state = gated_delta_update(q, k, v, a, b, a_log, dt_bias, state)
    normed = mx.fast.rms_norm(y, norm, eps).astype(mx.float32) * nn.silu(z.astype(mx.float32))
    return normed.astype(x.dtype).flatten(2), inputs[:, -window.shape[1] :], next_state


_GATED_DELTA = gpu.Call(
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
