"""Gated attention of a decode step: head norms and RoPE, then flash-decoding.

The kernels take a few tokens of one sequence and keep mlx-lm's shapes, ``[1, tokens, ...]``: a view of an array costs
no launch, but host time.
"""

import math
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from flashmoe_mlx.ops import gpu, native
from flashmoe_mlx.ops.dispatch import GPUS, Backend, Operation

# Queries that one SIMD group holds, and its lanes that share a key. A lane has 128 registers on Apple's GPUs and 255 on
# NVIDIA's. Heads of 256 elements need 79 with the first launch and 219 with the second.
_METAL_LAUNCH = (2, 32)
_CUDA_LAUNCH = (4, 16)
# Fewest positions of a split, if the cache has as many.
_SPLIT = 32
# The merge reads splits one after another.
_MAX_SPLITS = 128
# Groups of threads that share the merge of one head.
_MERGE_GROUPS = 8


class Heads(NamedTuple):
    """Heads of gated attention: their number, norms and rotation.

    Args:
        query (int): Number of query heads.
        key (int): Number of key and value heads.
        q_norm (mx.array): Weight of the queries' RMS norm, ``[head_dim]``.
        k_norm (mx.array): Weight of the keys' RMS norm, ``[head_dim]``.
        eps (float): Of both norms.
        dims (int): Rotated elements of a head; element ``i`` pairs with ``i + dims / 2``.
        base (float): RoPE's: element ``i`` rotates by ``position * scale * base ** (-2 i / dims)``.
        scale (float): Of positions.
    """

    query: int
    key: int
    q_norm: mx.array
    k_norm: mx.array
    eps: float
    dims: int
    base: float
    scale: float


@Operation
def norm_rope(x: mx.array, position: mx.array, heads: Heads) -> tuple[mx.array, mx.array, mx.array]:
    """Split projections into queries, keys and values; normalize and rotate queries and keys.

    Args:
        x (mx.array): Projections ``[1, tokens, width]``: for each query head its query and its output gate, then all
            keys, then all values.
        position (mx.array): Position of the first token, ``[1]``, integer.
        heads (Heads): The layer's.

    Returns:
        tuple: Queries ``[1, heads, tokens, head_dim]``, keys and values ``[1, key_heads, tokens, head_dim]``.
    """
    head_dim = heads.q_norm.size
    q, k, v = mx.split(x, [2 * heads.query * head_dim, (2 * heads.query + heads.key) * head_dim], axis=-1)
    q = q.reshape(1, -1, heads.query, 2 * head_dim)[..., :head_dim]
    k, v = (each.reshape(1, -1, heads.key, head_dim) for each in (k, v))

    def rotate(each: mx.array, weight: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(each, weight, heads.eps).swapaxes(1, 2)
        return mx.fast.rope(
            normed, heads.dims, traditional=False, base=heads.base, scale=heads.scale, offset=position.squeeze(0)
        )

    return rotate(q, heads.q_norm), rotate(k, heads.k_norm), v.swapaxes(1, 2)


@norm_rope.kernel(Backend.NATIVE, serves=lambda x, position, heads: x.dtype == mx.float32)
def _(x: mx.array, position: mx.array, heads: Heads) -> tuple[mx.array, mx.array, mx.array]:
    frequencies = _frequencies(heads.dims, heads.base, heads.scale)
    return native.require().norm_rope(
        x, heads.q_norm, heads.k_norm, position, frequencies, heads.query, heads.key, heads.eps
    )


@norm_rope.kernel(*GPUS)
def _(x: mx.array, position: mx.array, heads: Heads) -> tuple[mx.array, mx.array, mx.array]:
    head_dim = heads.q_norm.size
    queries, keys, values = gpu.run(
        _NORM_ROPE,
        [x, heads.q_norm, heads.k_norm, position, mx.array([math.log2(heads.base), heads.scale, heads.eps])],
        [(1, count, x.shape[1], head_dim) for count in (heads.query, heads.key, heads.key)],
        threadgroups=(heads.query + 2 * heads.key, x.shape[1]),
        simdgroups=1,
        template={"DIM": head_dim, "DIMS": heads.dims, "HEADS": heads.query, "KEY_HEADS": heads.key},
    )
    return queries, keys, values


@cache
def _frequencies(dims: int, base: float, scale: float) -> mx.array:
    """Return the angles of one position, ``[dims / 2]``, computed as MLX does and scaled."""
    frequencies = mx.exp(mx.arange(0, -(dims // 2), -1, mx.float32) * (math.log(base) / (dims // 2))) * scale
    mx.eval(frequencies)
    return frequencies


def _decode_attention_on_gpu(
    queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float
) -> bool:
    return queries.shape[-1] % 32 == 0 and queries.dtype == keys.dtype == values.dtype


@Operation
def decode_attention(
    queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float
) -> mx.array:
    """Attend from the last tokens of a sequence, and multiply by the sigmoid of the output gates.

    Args:
        queries (mx.array): ``[1, heads, tokens, head_dim]``.
        keys (mx.array): ``[1, key_heads, capacity, head_dim]``: all positions up to the tokens' own, then unused
            capacity of the cache.
        values (mx.array): Like ``keys``.
        position (mx.array): Position of the first token, ``[1]``, int32.
        x (mx.array): Projections ``[1, tokens, width]``, see :func:`norm_rope`.
        scale (float): Of the scores.

    Returns:
        mx.array: ``[1, tokens, heads * head_dim]``, dtype of ``x``.
    """
    _, heads, tokens, head_dim = queries.shape
    mask = mx.arange(keys.shape[2]) <= position + mx.arange(tokens)[:, None]
    y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    gates = x[..., : 2 * heads * head_dim].reshape(1, tokens, heads, 2, head_dim)[..., 1, :]
    return (y.swapaxes(1, 2) * mx.sigmoid(gates)).flatten(2)


@decode_attention.kernel(
    Backend.NATIVE, serves=lambda queries, *_: queries.shape[-1] % 16 == 0 and queries.dtype == mx.float32
)
def _(queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float) -> mx.array:
    return native.require().decode_attention(queries, keys, values, position, x, scale)


@decode_attention.kernel(Backend.METAL, serves=_decode_attention_on_gpu)
def _(queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float) -> mx.array:
    # A lane reads whole words: two elements of half precision.
    each, lanes = _METAL_LAUNCH if queries.shape[-1] % 64 == 0 else _CUDA_LAUNCH
    return _flash_decoding(queries, keys, values, position, x, scale, each, lanes)


@decode_attention.kernel(Backend.CUDA, serves=_decode_attention_on_gpu)
def _(queries: mx.array, keys: mx.array, values: mx.array, position: mx.array, x: mx.array, scale: float) -> mx.array:
    return _flash_decoding(queries, keys, values, position, x, scale, *_CUDA_LAUNCH)


def _flash_decoding(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    position: mx.array,
    x: mx.array,
    scale: float,
    queries_each: int,
    lanes: int,
) -> mx.array:
    _, heads, tokens, head_dim = queries.shape
    _, key_heads, capacity, _ = keys.shape
    share = heads // key_heads
    queries_each = math.gcd(share, queries_each)
    splits = min(_MAX_SPLITS, -(-capacity // _SPLIT))
    sums, weights = gpu.run(
        _ATTENTION_SPLIT,
        [queries, keys, values, position, mx.array([scale * math.log2(math.e)])],
        [(tokens, heads, splits, head_dim), (tokens, heads, splits, 2)],
        dtypes=[mx.float32, mx.float32],
        threadgroups=(key_heads * splits, tokens),
        simdgroups=share // queries_each,
        template={"DIM": head_dim, "SHARE": share, "EACH": queries_each, "LANES": lanes},
    )
    (out,) = gpu.run(
        _ATTENTION_MERGE,
        [x, sums, weights],
        [(1, tokens, heads * head_dim)],
        threadgroups=(heads, tokens),
        simdgroups=_MERGE_GROUPS * head_dim // 128,
        template={"DIM": head_dim, "GROUPS": _MERGE_GROUPS},
    )
    return out


_NORM_ROPE = gpu.Kernel(
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
_ATTENTION_SPLIT = gpu.Kernel(
    "attention_split",
    ("queries", "keys", "values", "position", "scale"),
    """
    const int splits = threadgroups_per_grid.x / keys_shape[1];
    attention_split<T, DIM, SHARE, EACH, LANES>(
        queries, keys, values, position, scale, sums, weights,
        queries_shape[2], queries_shape[1], keys_shape[2], splits, threadgroup_position_in_grid.x / splits,
        threadgroup_position_in_grid.x % splits, threadgroup_position_in_grid.y,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
    ("sums", "weights"),
)
_ATTENTION_MERGE = gpu.Kernel(
    "attention_merge",
    ("x", "sums", "weights"),
    """
    threadgroup float shared_[GROUPS * (DIM + 1)];
    attention_merge<T, DIM, GROUPS>(
        x, sums, weights, out, shared_,
        sums_shape[1], sums_shape[2], x_shape[2], threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup, thread_index_in_simdgroup);
    """,
)
