"""What lies between the products of Qwen3.5's and Qwen3-Next's layers: one function per kernel, and its twin.

See :mod:`flashmoe_mlx.ops.products`. The kernels take few tokens of one sequence and keep mlx-lm's shapes,
``[1, tokens, ...]``: a view of an array is no launch, but work for the host.
"""

import math
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from flashmoe_mlx.ops import gpu
from flashmoe_mlx.ops.products import MAX_TOP_K, Dense, has_kernel, linear, native_kernels

_DELTA_SIMDGROUPS = 16  # that share a head's state
_QUERIES = 4  # that a simdgroup has
_PART = 32  # positions that a part of attention has at least, if there are as many
_MOST_PARTS = 128  # what merges them takes them one after another


Layout = tuple[tuple[int, int], ...]
"""Where a row of projections has queries, keys, values, gates of the output, betas and decays: for each of these six
the first column of key head 0, and how many columns further the next key head has its own."""


def layout_of(mixer: nn.Module) -> Layout:
    """How mlx-lm's GatedDeltaNet of Qwen3.5 or Qwen3-Next projects, its projections one behind the other."""
    heads, key_dim, value_dim = mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    share = mixer.num_v_heads // heads
    sizes = (key_dim, key_dim, share * value_dim, share * value_dim, share, share)  # of a key head
    starts = [sum(sizes[:part]) for part in range(6)]
    if isinstance(mixer, qwen3_5.GatedDeltaNet):  # all heads' queries, then all heads' keys, ...
        return tuple((heads * start, size) for start, size in zip(starts, sizes, strict=True))
    stride = starts[4]  # a key head's queries, keys, values and gates, then another's; behind them betas and decays
    return tuple([(start, stride) for start in starts[:4]] + [(heads * stride + i * share, 2 * share) for i in (0, 1)])


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


def ask(x: mx.array, router: Dense, gate: Dense, up: Dense) -> tuple[mx.array, mx.array]:
    """What a block of experts begins with: the router's logits, and the hidden activations of the shared expert.

    Args:
        x (mx.array): ``[1, tokens, columns]``.
        router (Dense): of ``experts + 1`` rows.
        gate (Dense): the shared expert's.
        up (Dense): like ``gate``; the kernel wants the same bits and groups, too.

    Returns:
        tuple: ``[1, tokens, experts + 1]`` and ``[1, tokens, gate's rows]``.
    """
    tokens = x.shape[1]
    if gate[3:] == up[3:] and (kernels := native_kernels(x)):
        formats = (router.group_size, router.bits), (gate.group_size, gate.bits)
        return kernels.ask(x, *router[:3], *formats[0], *gate[:3], *up[:3], *formats[1])
    if not gpu.on_gpu() or gate[3:] != up[3:] or not has_kernel(x, x[..., :1], router, gate, up):
        return ask_twin(x, router, gate, up)
    rows = 2 if gate.bits == 2 else 1  # of a simdgroup
    hidden_size, logits_size = gate.weight.shape[0], router.weight.shape[0]
    hidden, logits = gpu.run(
        _ASK,
        [x, *gate[:3], *up[:3], *router[:3]],
        [(1, tokens, hidden_size), (1, tokens, logits_size)],
        threadgroups=(-(-hidden_size // (2 * rows)) + -(-logits_size // 4), tokens),
        simdgroups=2,
        template={
            "BITS": gate.bits,
            "GROUP": gate.group_size,
            "ROWS": rows,
            "ROUTER_BITS": router.bits,
            "ROUTER_GROUP": router.group_size,
        },
    )
    return logits, hidden


def ask_twin(x: mx.array, router: Dense, gate: Dense, up: Dense) -> tuple[mx.array, mx.array]:
    """:func:`ask` in MLX operations, as mlx-lm's blocks compute it."""
    return linear(x, *router), nn.silu(linear(x, *gate)) * linear(x, *up)


def route(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """The experts of each token: the most likely ones, of equal ones those of higher numbers.

    Args:
        logits (mx.array): those of the experts, then that of the shared expert, ``[1, tokens, experts + 1]``.
        top_k (int): how many.
        normalize (bool): whether the scores of a token's experts add up to 1.

    Returns:
        tuple: expert numbers ``[1, tokens, top_k]``, uint32, in no order that counts; and their scores, followed by the
        shared expert's, ``[1, tokens, top_k + 1]``, of the dtype of ``logits``.
    """
    if kernels := native_kernels(logits):
        return kernels.route(logits, top_k, normalize)
    if not gpu.on_gpu() or top_k > MAX_TOP_K or logits.size < gpu.DEVICE_MEMORY:
        return route_twin(logits, top_k, normalize)
    _, tokens, logits_size = logits.shape
    chosen, scores = gpu.run(
        _ROUTE,
        [logits],
        [(1, tokens, top_k), (1, tokens, top_k + 1)],
        dtypes=[mx.uint32, logits.dtype],
        threadgroups=(tokens, 1),
        simdgroups=1,
        template={"EXPERTS": logits_size - 1, "TOP_K": top_k, "NORMALIZE": normalize},
    )
    return chosen, scores


def route_twin(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """:func:`route` in MLX operations, as mlx-lm's blocks compute it."""
    gates = mx.softmax(logits[..., :-1], axis=-1, precise=True)
    experts = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
    scores = mx.take_along_axis(gates, experts, axis=-1)
    if normalize:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts, mx.concatenate([scores, mx.sigmoid(logits[..., -1:])], axis=-1)


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """A residual connection and the RMS norm behind it.

    Args:
        x (mx.array): ``[1, tokens, hidden]``.
        y (mx.array): likewise.
        weight (mx.array): of the norm, ``[hidden]``.
        eps (float): of the norm.

    Returns:
        tuple: ``x + y``, and its norm.
    """
    if kernels := native_kernels(x):
        return kernels.add_norm(x, y, weight, eps)
    _, tokens, hidden = x.shape
    if not gpu.on_gpu() or hidden % 32:
        return add_norm_twin(x, y, weight, eps)
    total, normed = gpu.run(
        _ADD_NORM,
        [x, y, weight, mx.array([eps])],
        [x.shape, x.shape],
        threadgroups=(tokens, 1),
        simdgroups=16,
        template={"HIDDEN": hidden},
    )
    return total, normed


def add_norm_twin(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """:func:`add_norm` in MLX operations."""
    total = x + y
    return total, mx.fast.rms_norm(total, weight, eps)


def combine(
    x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """The end of a layer, experts weighted and added to the residual, and the norm that the next layer begins with.

    Args:
        x (mx.array): ``[1, tokens, hidden]``.
        y (mx.array): of the routed experts, ``[1, tokens, top_k, hidden]``.
        scores (mx.array): theirs and that of the shared expert, ``[1, tokens, top_k + 1]``.
        shared (mx.array): of the shared expert, ``[1, tokens, hidden]``.
        weight (mx.array): of the norm, ``[hidden]``.
        eps (float): of the norm.

    Returns:
        tuple: ``[1, tokens, hidden]``, and its norm.
    """
    if kernels := native_kernels(x):
        return kernels.combine(x, y, scores, shared, weight, eps)
    _, tokens, hidden = x.shape
    if not gpu.on_gpu() or hidden % 32:
        return combine_twin(x, y, scores, shared, weight, eps)
    out, normed = gpu.run(
        _COMBINE,
        [x, y, scores, shared, weight, mx.array([eps])],
        [x.shape, x.shape],
        threadgroups=(tokens, 1),
        simdgroups=16,
        template={"HIDDEN": hidden, "TOP_K": y.shape[2]},
    )
    return out, normed


def combine_twin(
    x: mx.array, y: mx.array, scores: mx.array, shared: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """:func:`combine` in MLX operations, as mlx-lm's blocks compute it."""
    routed = (y * scores[..., :-1, None]).sum(axis=-2)
    return add_norm_twin(x, routed + scores[..., -1:] * shared, weight, eps)


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
_ROUTE = gpu.Call(
    "route",
    ("logits",),
    """
    route<T, EXPERTS, TOP_K, NORMALIZE>(
        logits, experts, scores, threadgroup_position_in_grid.x, thread_index_in_simdgroup);
    """,
    ("experts", "scores"),
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
_ASK = gpu.Call(
    "ask",
    (
        *("x", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
        *("router_weight", "router_scales", "router_biases"),
    ),
    """
        ask<T, BITS, GROUP, ROWS, ROUTER_BITS, ROUTER_GROUP, SIMDGROUPS>(
            x, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases,
            router_weight, router_scales, router_biases, hidden, logits,
            x_shape[2], gate_scales_shape[0], router_scales_shape[0], threadgroup_position_in_grid.y,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("hidden", "logits"),
    uses=("quantized", "gate_up", "matvec", "linear"),
)
_ADD_NORM = gpu.Call(
    "add_norm",
    ("x", "y", "weight", "eps"),
    """
        threadgroup float partial[SIMDGROUPS];
        add_norm<T, HIDDEN, SIMDGROUPS>(
            x, y, weight, eps, sum, normed, partial,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("sum", "normed"),
    uses=("quantized", "norm"),
)
_COMBINE = gpu.Call(
    "combine",
    ("x", "y", "scores", "shared", "weight", "eps"),
    """
        threadgroup float partial[SIMDGROUPS];
        combine<T, HIDDEN, TOP_K, SIMDGROUPS>(
            x, y, scores, shared, weight, eps, out, normed, partial,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ("out", "normed"),
    uses=("quantized", "norm"),
)
