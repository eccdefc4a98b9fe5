"""Attention of a decode step: norm and RoPE, then flash-decoding."""

import math
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.dispatch import native_kernels

_QUERIES = 4  # that a simdgroup has

_PART = 32  # positions that a part of attention has at least, if there are as many

_MOST_PARTS = 128  # what merges them takes them one after another


class Rope(NamedTuple):
    """How attention norms and turns its queries and keys.

    Args:
        dims (int): elements of a head that turn; element ``i`` does with element ``i + dims / 2``.
        base (float): of the angles: element ``i`` turns by ``position * scale * base ** (-2 i / dims)``.
        scale (float): of positions.
        eps (float): of the norms.
    """

    dims: int
    base: float
    scale: float
    eps: float


def norm_rope(
    x: mx.array, q_norm: mx.array, k_norm: mx.array, position: mx.array, *, heads: int, key_heads: int, rope: Rope
) -> tuple[mx.array, mx.array, mx.array]:
    """The queries and keys of attention, the norm of each head, then RoPE; and its values, as they are.

    Args:
        x (mx.array): what is projected, ``[1, tokens, width]``: for each head its query and its output's gate, then the
            keys, then the values.
        q_norm (mx.array): weight of the norm, ``[head_dim]``.
        k_norm (mx.array): likewise.
        position (mx.array): of the first token, ``[1]``, an integer.
        heads (int): of queries.
        key_heads (int): of keys.
        rope (Rope): how to turn them.

    Returns:
        tuple: queries ``[1, heads, tokens, head_dim]``, keys and values ``[1, key_heads, tokens, head_dim]``.
    """
    if kernels := native_kernels(x):
        frequencies = _frequencies(rope.dims, rope.base, rope.scale)
        return kernels.norm_rope(x, q_norm, k_norm, position, frequencies, heads, key_heads, rope.eps)
    if not gpu.on_gpu():
        return norm_rope_twin(x, q_norm, k_norm, position, heads=heads, key_heads=key_heads, rope=rope)
    head_dim = q_norm.size
    queries, keys, values = gpu.run(
        _NORM_ROPE,
        [x, q_norm, k_norm, position, mx.array([math.log2(rope.base), rope.scale, rope.eps])],
        [(1, count, x.shape[1], head_dim) for count in (heads, key_heads, key_heads)],
        threadgroups=(heads + 2 * key_heads, x.shape[1]),
        simdgroups=1,
        template={"DIM": head_dim, "DIMS": rope.dims, "HEADS": heads, "KEY_HEADS": key_heads},
    )
    return queries, keys, values


@cache
def _frequencies(dims: int, base: float, scale: float) -> mx.array:
    """The angles of a step, ``[dims / 2]``, as MLX computes them, but for the scale."""
    frequencies = mx.exp(mx.arange(0, -(dims // 2), -1, mx.float32) * (math.log(base) / (dims // 2))) * scale
    mx.eval(frequencies)
    return frequencies


def norm_rope_twin(
    x: mx.array, q_norm: mx.array, k_norm: mx.array, position: mx.array, *, heads: int, key_heads: int, rope: Rope
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`norm_rope` in MLX operations, as mlx-lm's layers compute it."""
    head_dim = q_norm.size
    q, k, v = mx.split(x, [2 * heads * head_dim, (2 * heads + key_heads) * head_dim], axis=-1)
    q = q.reshape(1, -1, heads, 2 * head_dim)[..., :head_dim]
    k, v = (each.reshape(1, -1, key_heads, head_dim) for each in (k, v))

    def turned(each: mx.array, norm: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(each, norm, rope.eps).swapaxes(1, 2)
        return mx.fast.rope(
            normed, rope.dims, traditional=False, base=rope.base, scale=rope.scale, offset=position.squeeze(0)
        )

    return turned(q, q_norm), turned(k, k_norm), v.swapaxes(1, 2)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float
) -> mx.array:
    """Attention of a few tokens, the last ones of their sequence, times the sigmoid of the output's gate.

    Args:
        queries (mx.array): ``[1, heads, tokens, head_dim]``.
        keys (mx.array): ``[1, key_heads, capacity, head_dim]``: those of all positions, the tokens' own included, and
            behind them whatever there is room for.
        values (mx.array): like ``keys``.
        position (mx.array): of the first token, ``[1]``, int32.
        x (mx.array): what is projected, ``[1, tokens, width]``; see :func:`norm_rope`.
        scale (float): of the scores.

    Returns:
        mx.array: ``[1, tokens, heads * head_dim]``, of the dtype of ``x``.
    """
    _, heads, tokens, head_dim = queries.shape
    _, key_heads, capacity, _ = keys.shape
    if head_dim % 16 == 0 and (kernels := native_kernels(x)):
        return kernels.attend(queries, keys, values, position, x, scale)
    if not gpu.on_gpu() or head_dim % 32 or not queries.dtype == keys.dtype == values.dtype:
        return attend_twin(queries, keys, values, position, x, scale)
    share = heads // key_heads
    each = math.gcd(share, _QUERIES)
    parts = min(_MOST_PARTS, -(-capacity // _PART))
    sums, weights = gpu.run(
        _ATTEND,
        [queries, keys, values, position, mx.array([scale * math.log2(math.e)])],
        [(tokens, heads, parts, head_dim), (tokens, heads, parts, 2)],
        dtypes=[mx.float32, mx.float32],
        threadgroups=(key_heads * parts, tokens),
        simdgroups=share // each,
        template={"DIM": head_dim, "SHARE": share, "EACH": each},
    )
    (out,) = gpu.run(
        _MERGE_ATTENDED,
        [x, sums, weights],
        [(1, tokens, heads * head_dim)],
        threadgroups=(heads, tokens),
        simdgroups=(groups := 8) * head_dim // 128,
        template={"DIM": head_dim, "GROUPS": groups},
    )
    return out


def attend_twin(
    queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float
) -> mx.array:
    """:func:`attend` in MLX operations, as mlx-lm's layers compute it."""
    _, heads, tokens, head_dim = queries.shape
    mask = mx.arange(keys.shape[2]) <= position + mx.arange(tokens)[:, None]
    y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    gates = x[..., : 2 * heads * head_dim].reshape(1, tokens, heads, 2, head_dim)[..., 1, :]
    return (y.swapaxes(1, 2) * mx.sigmoid(gates)).flatten(2)


_NORM_ROPE = gpu.Call(
    "norm_rope",
    ("x", "q_norm", "k_norm", "position", "rope"),
    """
    norm_rope<T, DIM, DIMS, HEADS, KEY_HEADS>(
        x, q_norm, k_norm, position, rope, queries, keys, values,
        x_shape[1], x_shape[2], threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        thread_index_in_simdgroup);
    """,
    ("queries", "keys", "values"),
)

_ATTEND = gpu.Call(
    "attend",
    ("queries", "keys", "values", "position", "scale"),
    """
        const int parts = threadgroups_per_grid.x / keys_shape[1];
        attend<T, DIM, SHARE, EACH>(
            queries, keys, values, position, scale, sums, weights,
            queries_shape[2], queries_shape[1], keys_shape[2], parts, threadgroup_position_in_grid.x / parts,
            threadgroup_position_in_grid.x % parts, threadgroup_position_in_grid.y,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("sums", "weights"),
)

_MERGE_ATTENDED = gpu.Call(
    "merge_attended",
    ("x", "sums", "weights"),
    """
        threadgroup float shared_[GROUPS * (DIM + 1)];
        merge_attended<T, DIM, GROUPS>(
            x, sums, weights, out, shared_,
            sums_shape[1], sums_shape[2], x_shape[2], threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
            simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup, thread_index_in_simdgroup);
        """,
)
