"""What a token costs, in few launches: one function per kernel, its twin in MLX operations, one dispatch rule.

A GPU's kernel is a file of ``kernels/``, whose README tells how it is launched and why. It takes few tokens, as in
decoding, and reads slabs in place. Activations must begin at a multiple of 16 bytes: an array of its own does, a slice
of another may not. A CPU's kernels are in ``native/`` and take any number of tokens.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from flashmoe_mlx import native
from flashmoe_mlx.config import data_dir

MAX_PAIRS = 128  # of a token and an expert; a product of more is a matrix product, and MLX's own are better at that
MAX_TOP_K = 16  # experts of a token, for down()
_DELTA_SIMDGROUPS = 16  # that share a head's state
_DEVICE_MEMORY = 8  # elements; MLX passes smaller arrays in constant memory, where the kernels expect no matrix


class Quantized(NamedTuple):
    """Matrices in MLX's affine quantisation: ``weight = scale * q + bias``, for each group of a row's elements.

    Args:
        weight (mx.array): ``[slots, rows, columns * bits / 32]``, uint32.
        scales (mx.array): ``[slots, rows, columns / group_size]``, of the activations' dtype.
        biases (mx.array): like ``scales``.
        group_size (int): 32, 64 or 128.
        bits (int): 2, 3, 4, 5, 6 or 8.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def rows(self) -> int:
        """Elements of a product."""
        return self.weight.shape[1]


Layout = tuple[tuple[int, int], ...]
"""Where a row of projections has queries, keys, values, gates of the output, betas and decays: for each of these six
the first column of key head 0, and how many columns further the next key head has its own."""


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


def has_kernel(x: mx.array, slots: mx.array, *matrices: Quantized) -> bool:
    """The dispatch rule: whether the kernels run, on this device and for these operands. Otherwise the twins do.

    Args:
        x (mx.array): activations, whatever their shape.
        slots (mx.array): ``[..., top_k]``, one for each product.
        matrices (Quantized): what they are multiplied with.
    """
    if not _on_gpu():
        return x.dtype == mx.float32 and slots.size > 0 and native.kernels() is not None
    return (
        _on_gpu()
        and 0 < slots.size <= MAX_PAIRS
        and slots.shape[-1] <= MAX_TOP_K
        and all(matrix.scales.dtype == x.dtype and matrix.scales.size >= _DEVICE_MEMORY for matrix in matrices)
    )


def _on_gpu() -> bool:
    on_gpu: bool = mx.default_device().type == mx.gpu
    return on_gpu


def _native() -> native.Kernels | None:
    return None if _on_gpu() else native.kernels()


def gate_up(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    """The hidden activations of SwiGLU experts: ``silu(gate[slot] x) * (up[slot] x)``, for every slot of a token.

    Args:
        x (mx.array): ``[tokens, columns]``.
        slots (mx.array): where the experts of each token are, ``[tokens, top_k]``, uint32.
        gate (Quantized): ``[slots, rows, columns]``.
        up (Quantized): like ``gate``; the kernel wants the same bits and groups, too.

    Returns:
        mx.array: ``[tokens, top_k, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if gate[3:] != up[3:] or not has_kernel(x, slots, gate, up):
        return gate_up_twin(x, slots, gate, up)
    if kernels := _native():
        return kernels.gate_up(x, slots.astype(mx.uint32), *gate[:3], *up[:3], gate.group_size, gate.bits)
    return _launch(
        "gate_up",
        [x, slots, *gate[:3], *up[:3]],
        (*slots.shape, gate.rows),
        vectors=slots.size,
        simdgroups=2,
        tile=2 * (rows := 2 if gate.bits == 2 else 1),
        template={"BITS": gate.bits, "GROUP": gate.group_size, "ROWS": rows, "LANES": 32, "TOP_K": slots.shape[1]},
    )


def gate_up_twin(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized) -> mx.array:
    """:func:`gate_up` in MLX operations, as mlx-lm's ``SwitchGLU`` computes it."""
    x = x[:, None]
    hidden: mx.array = nn.silu(matvec_twin(x, slots, gate)) * matvec_twin(x, slots, up)
    return hidden


def down(x: mx.array, slots: mx.array, scores: mx.array, matrix: Quantized) -> mx.array:
    """The output of a token's experts, weighted and summed: ``sum over k of scores[k] * (matrix[slots[k]] x[k])``.

    Args:
        x (mx.array): ``[tokens, top_k, columns]``.
        slots (mx.array): ``[tokens, top_k]``, uint32.
        scores (mx.array): ``[tokens, top_k]``, of any floating dtype.
        matrix (Quantized): ``[slots, rows, columns]``.

    Returns:
        mx.array: ``[tokens, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if not has_kernel(x, slots, matrix):
        return down_twin(x, slots, scores, matrix)
    if kernels := _native():
        return kernels.down(x, slots.astype(mx.uint32), scores.astype(mx.float32), *matrix)
    tokens, top_k = slots.shape
    return _launch(
        "down",
        [x, slots, scores, *matrix[:3]],
        (tokens, matrix.rows),
        vectors=tokens,
        simdgroups=top_k,
        tile=4,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": 2, "LANES": 16, "TOP_K": top_k},
    )


def down_twin(x: mx.array, slots: mx.array, scores: mx.array, matrix: Quantized) -> mx.array:
    """:func:`down` in MLX operations, as mlx-lm's blocks compute it."""
    return (matvec_twin(x, slots, matrix) * scores[..., None]).sum(axis=-2).astype(x.dtype)


def experts(x: mx.array, slots: mx.array, gate: Quantized, up: Quantized, down: Quantized) -> mx.array:
    """SwiGLU experts, an output for each: what mlx-lm's ``SwitchGLU`` returns.

    Args:
        x (mx.array): ``[..., hidden]``.
        slots (mx.array): ``[..., top_k]``, uint32.
        gate (Quantized): ``[slots, intermediate, hidden]``.
        up (Quantized): like ``gate``.
        down (Quantized): ``[slots, hidden, intermediate]``.

    Returns:
        mx.array: ``[..., top_k, hidden]``, of the dtype of ``x``. Where kernels run, an output depends on its own
        token and expert only, not on what else is computed in the same call.
    """
    pairs = slots.reshape(-1, slots.shape[-1])
    y = matvec(gate_up(x.reshape(-1, x.shape[-1]), pairs, gate, up), pairs, down)
    return y.reshape(*slots.shape, -1)


def matvec(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    """Products of vectors and matrices: ``matrix[slot] x`` for each slot and the vector in its place.

    With one slot a product of plain matrices is one of experts, so this serves dense layers too.

    Args:
        x (mx.array): ``[tokens, top_k, columns]``.
        slots (mx.array): ``[tokens, top_k]``, uint32.
        matrix (Quantized): ``[slots, rows, columns]``.

    Returns:
        mx.array: ``[tokens, top_k, rows]``, of the dtype of ``x``. The kernel adds up in float32 and rounds once.
    """
    if not has_kernel(x, slots, matrix):
        return matvec_twin(x, slots, matrix)
    if kernels := _native():
        return kernels.matvec(x, slots.astype(mx.uint32), *matrix)
    return _launch(
        "matvec",
        [x, slots, *matrix[:3]],
        (*slots.shape, matrix.rows),
        vectors=slots.size,
        simdgroups=4,
        tile=16,
        template={"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": 2, "LANES": 16},
    )


def matvec_twin(x: mx.array, slots: mx.array, matrix: Quantized) -> mx.array:
    """:func:`matvec` in MLX operations. ``x`` may also be broadcast to the shape of ``slots``."""
    weight, scales, biases, group_size, bits = matrix
    return mx.gather_qmm(
        x[..., None, :], weight, scales, biases, rhs_indices=slots, transpose=True, group_size=group_size, bits=bits
    ).squeeze(-2)


def linear(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """Products of vectors and one matrix, as a dense layer has them.

    Args:
        x (mx.array): ``[..., columns]``.
        weight (mx.array): ``[rows, columns * bits / 32]``, uint32; see :class:`Quantized` for the rest.

    Returns:
        mx.array: ``[..., rows]``, of the dtype of ``x``. A native kernel computes each vector by itself.
    """
    if x.dtype == mx.float32 and (kernels := _native()):
        return kernels.linear(x, weight, scales, biases, group_size, bits)
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


def product(x: mx.array, matrix: Quantized) -> mx.array:
    """``x`` times a matrix: on a GPU MLX's own product, next to which no kernel of ours is needed.

    Args:
        x (mx.array): ``[tokens, columns]``.
        matrix (Quantized): of one slot.

    Returns:
        mx.array: ``[tokens, rows]``.
    """
    weight, scales, biases = (part.squeeze(0) for part in matrix[:3])
    return linear(x, weight, scales, biases, matrix.group_size, matrix.bits)


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
        x (mx.array): what is projected, ``[tokens, width]``.
        window (mx.array): queries, keys and values of the last tokens, ``[1, taps - 1, channels]``.
        state (mx.array): ``[1, value_heads, value_dim, key_dim]``, float32.
        taps (mx.array): the convolution's weight, ``[channels, taps, 1]``.
        a_log (mx.array): logarithm of a head's rate of decay, ``[value_heads]``.
        dt_bias (mx.array): added to the projected decay, ``[value_heads]``.
        norm (mx.array): weight of the norm, ``[value_dim]``.
        layout (tuple): where ``x`` has what; see :data:`Layout`.
        eps (float): of the norm.

    Returns:
        tuple: ``[tokens, value_heads * value_dim]``, and the next window and state.
    """
    _, heads, value_dim, key_dim = state.shape
    if not _on_gpu() or key_dim % 32 or value_dim % _DELTA_SIMDGROUPS:
        return gated_delta_twin(x, window, state, taps, a_log, dt_bias, norm, layout=layout, eps=eps)
    template = {
        "DK": key_dim,
        "DV": value_dim,
        "TAPS": taps.shape[1],
        "KEY_HEADS": (taps.shape[0] - heads * value_dim) // (2 * key_dim),
        "VALUE_HEADS": heads,
    }
    out, next_window, next_state = _run(
        "gated_delta",
        [x, mx.array(layout), window, state, taps, a_log, dt_bias, norm, mx.array([eps])],
        [(x.shape[0], heads * value_dim), window.shape, state.shape],
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
        return mx.concatenate([x[None, :, start : start + size] for start in starts], axis=-1)

    q, k, v, z, b, a = map(part, layout, (key_dim, key_dim, *[share * value_dim] * 2, share, share))
    inputs = mx.concatenate([window, mx.concatenate([q, k, v], axis=-1)], axis=1)
    convolved = nn.silu(mx.conv1d(inputs, taps, groups=taps.shape[0]))
    q, k, v = mx.split(convolved, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (each.reshape(1, -1, key_heads, key_dim) for each in (q, k))
    q, k = normalize_qk(q, k, inv_scale=key_dim**-0.5, eps=1e-6)
    v, z = (each.reshape(1, -1, heads, value_dim) for each in (v, z))
    y, next_state = gated_delta_update(q, k, v, a, b, a_log, dt_bias, state)
    normed = mx.fast.rms_norm(y, norm, eps).astype(mx.float32) * nn.silu(z.astype(mx.float32))
    return normed.astype(x.dtype).reshape(x.shape[0], -1), inputs[:, -window.shape[1] :], next_state


def norm_rope(
    x: mx.array, q_norm: mx.array, k_norm: mx.array, position: mx.array, *, heads: int, key_heads: int, rope: Rope
) -> tuple[mx.array, mx.array]:
    """The queries and keys of attention: the norm of each head, then RoPE.

    Args:
        x (mx.array): what is projected, ``[tokens, width]``: for each head its query and its output's gate, then the
            keys, then what else.
        q_norm (mx.array): weight of the norm, ``[head_dim]``.
        k_norm (mx.array): likewise.
        position (mx.array): of the first token, ``[1]``, an integer.
        heads (int): of queries.
        key_heads (int): of keys.
        rope (Rope): how to turn them.

    Returns:
        tuple: queries ``[1, heads, tokens, head_dim]`` and keys ``[1, key_heads, tokens, head_dim]``.
    """
    if not _on_gpu():
        return norm_rope_twin(x, q_norm, k_norm, position, heads=heads, key_heads=key_heads, rope=rope)
    head_dim = q_norm.size
    (out,) = _run(
        "norm_rope",
        [x, q_norm, k_norm, position, mx.array([math.log2(rope.base), rope.scale, rope.eps])],
        [(1, heads + key_heads, x.shape[0], head_dim)],
        threadgroups=(heads + key_heads, x.shape[0]),
        simdgroups=1,
        template={"DIM": head_dim, "DIMS": rope.dims, "HEADS": heads},
    )
    return out[:, :heads], out[:, heads:]


def norm_rope_twin(
    x: mx.array, q_norm: mx.array, k_norm: mx.array, position: mx.array, *, heads: int, key_heads: int, rope: Rope
) -> tuple[mx.array, mx.array]:
    """:func:`norm_rope` in MLX operations, as mlx-lm's layers compute it."""
    head_dim = q_norm.size
    q, k = mx.split(x[None, :, : (2 * heads + key_heads) * head_dim], [2 * heads * head_dim], axis=-1)
    q = q.reshape(1, -1, heads, 2 * head_dim)[..., :head_dim]
    k = k.reshape(1, -1, key_heads, head_dim)

    def turned(each: mx.array, norm: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(each, norm, rope.eps).swapaxes(1, 2)
        return mx.fast.rope(
            normed, rope.dims, traditional=False, base=rope.base, scale=rope.scale, offset=position.squeeze(0)
        )

    return turned(q, q_norm), turned(k, k_norm)


def route(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """The experts of each token: the most likely ones, of equal ones those of higher numbers.

    Args:
        logits (mx.array): those of the experts, then that of the shared expert, ``[tokens, experts + 1]``.
        top_k (int): how many.
        normalize (bool): whether the scores of a token's experts add up to 1.

    Returns:
        tuple: expert numbers ``[tokens, top_k]``, uint32, in no order that counts; and their scores, followed by the
        shared expert's, ``[tokens, top_k + 1]``, of the dtype of ``logits``.
    """
    if not _on_gpu() or top_k > MAX_TOP_K or logits.size < _DEVICE_MEMORY:
        return route_twin(logits, top_k, normalize)
    tokens, experts = logits.shape[0], logits.shape[1] - 1
    chosen, scores = _run(
        "route",
        [logits],
        [(tokens, top_k), (tokens, top_k + 1)],
        dtypes=[mx.uint32, logits.dtype],
        threadgroups=(tokens, 1),
        simdgroups=1,
        template={"EXPERTS": experts, "TOP_K": top_k, "NORMALIZE": normalize},
    )
    return chosen, scores


def route_twin(logits: mx.array, top_k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """:func:`route` in MLX operations, as mlx-lm's blocks compute it."""
    gates = mx.softmax(logits[:, :-1], axis=-1, precise=True)
    experts = mx.argpartition(gates, kth=-top_k, axis=-1)[:, -top_k:]
    scores = mx.take_along_axis(gates, experts, axis=-1)
    if normalize:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts, mx.concatenate([scores, mx.sigmoid(logits[:, -1:])], axis=-1)


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """A residual connection and the RMS norm behind it.

    Args:
        x (mx.array): ``[tokens, hidden]``.
        y (mx.array): likewise.
        weight (mx.array): of the norm, ``[hidden]``.
        eps (float): of the norm.

    Returns:
        tuple: ``x + y``, and its norm.
    """
    if not _on_gpu():
        return add_norm_twin(x, y, weight, eps)
    tokens, hidden = x.shape
    total, normed = _run(
        "add_norm",
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


def combine(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array) -> mx.array:
    """The end of a layer: routed experts and the shared one, weighted and added to the residual.

    Args:
        x (mx.array): ``[tokens, hidden]``.
        y (mx.array): of the routed experts, ``[tokens, top_k, hidden]``.
        scores (mx.array): theirs and that of the shared expert, ``[tokens, top_k + 1]``.
        shared (mx.array): of the shared expert, ``[tokens, hidden]``.

    Returns:
        mx.array: ``[tokens, hidden]``.
    """
    if not _on_gpu():
        return combine_twin(x, y, scores, shared)
    tokens, hidden = x.shape
    simdgroups = 4
    (out,) = _run(
        "combine",
        [x, y, scores, shared],
        [x.shape],
        threadgroups=(-(-hidden // (32 * simdgroups)), tokens),
        simdgroups=simdgroups,
        template={"TOP_K": y.shape[1]},
    )
    return out


def combine_twin(x: mx.array, y: mx.array, scores: mx.array, shared: mx.array) -> mx.array:
    """:func:`combine` in MLX operations, as mlx-lm's blocks compute it."""
    routed = (y * scores[:, :-1, None]).sum(axis=1)
    return x + (routed + scores[:, -1:] * shared)


class _Call(NamedTuple):
    """What MLX makes a kernel of: the names of its operands, and a body that calls the function of its file."""

    inputs: tuple[str, ...]
    body: str
    outputs: tuple[str, ...] = ("out",)


_CALLS = {
    "gate_up": _Call(
        ("x", "slots", "gate_weight", "gate_scales", "gate_biases", "up_weight", "up_scales", "up_biases"),
        """
        gate_up<T, BITS, GROUP, ROWS, LANES, TOP_K>(
            x, slots, gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases, out,
            gate_scales_shape[2] * GROUP, gate_scales_shape[1], threadgroup_position_in_grid.y,
            threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ),
    "down": _Call(
        ("x", "slots", "scores", "weight", "scales", "biases"),
        """
        threadgroup float partial[TOP_K * ROWS * 32 / LANES];
        down<T, BITS, GROUP, ROWS, LANES, TOP_K>(
            x, slots, scores, weight, scales, biases, out, partial,
            scales_shape[2] * GROUP, scales_shape[1], threadgroup_position_in_grid.y,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ),
    "matvec": _Call(
        ("x", "slots", "weight", "scales", "biases"),
        """
        matvec<T, BITS, GROUP, ROWS, LANES>(
            x, slots, weight, scales, biases, out,
            scales_shape[2] * GROUP, scales_shape[1], threadgroup_position_in_grid.y,
            threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    ),
    "gated_delta": _Call(
        ("x", "layout", "window", "state", "taps", "a_log", "dt_bias", "norm", "eps"),
        """
        threadgroup float convolved[2 * DK + DV];
        threadgroup float read[DV];
        gated_delta<T, DK, DV, TAPS, KEY_HEADS, VALUE_HEADS, SIMDGROUPS>(
            x, layout, window, state, taps, a_log, dt_bias, norm, eps, out, next_window, next_state, convolved, read,
            x_shape[0], x_shape[1], threadgroup_position_in_grid.x,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
        ("out", "next_window", "next_state"),
    ),
    "norm_rope": _Call(
        ("x", "q_norm", "k_norm", "position", "rope"),
        """
        norm_rope<T, DIM, DIMS, HEADS>(
            x, q_norm, k_norm, position, rope, out,
            x_shape[0], x_shape[1], threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
            thread_index_in_simdgroup);
        """,
    ),
    "route": _Call(
        ("logits",),
        """
        route<T, EXPERTS, TOP_K, NORMALIZE>(
            logits, experts, scores, threadgroup_position_in_grid.x, thread_index_in_simdgroup);
        """,
        ("experts", "scores"),
    ),
    "add_norm": _Call(
        ("x", "y", "weight", "eps"),
        """
        threadgroup float partial[SIMDGROUPS];
        add_norm<T, HIDDEN, SIMDGROUPS>(
            x, y, weight, eps, sum, normed, partial,
            threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
        ("sum", "normed"),
    ),
    "combine": _Call(
        ("x", "y", "scores", "shared"),
        """
        combine<T, TOP_K>(
            x, y, scores, shared, out, x_shape[1], threadgroup_position_in_grid.y,
            (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup) * 32
                + thread_index_in_simdgroup);
        """,
    ),
}


def _launch(
    name: str,
    inputs: list[mx.array],
    shape: tuple[int, ...],
    *,
    vectors: int,
    simdgroups: int,
    tile: int,
    template: dict[str, Any],
) -> mx.array:
    """Run a kernel in threadgroups of ``simdgroups``, each of which makes ``tile`` elements of one of the vectors."""
    threadgroups = ((shape[-1] + tile - 1) // tile, vectors)
    (out,) = _run(name, inputs, [shape], threadgroups=threadgroups, simdgroups=simdgroups, template=template)
    return out


def _run(
    name: str,
    inputs: list[mx.array],
    shapes: list[tuple[int, ...]],
    *,
    dtypes: list[mx.Dtype] | None = None,
    threadgroups: tuple[int, int],
    simdgroups: int,
    template: dict[str, Any],
) -> list[mx.array]:
    """Run a kernel. Its outputs have the dtype of the first input, if ``dtypes`` does not say something else."""
    columns, rows = threadgroups
    return _kernel(name)(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=dtypes or [inputs[0].dtype] * len(shapes),
        grid=(32 * simdgroups * columns, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        template=[("T", inputs[0].dtype), ("SIMDGROUPS", simdgroups), *template.items()],
    )


@cache
def _kernel(name: str) -> Callable[..., list[mx.array]]:
    folder = data_dir("kernels")
    inputs, body, outputs = _CALLS[name]
    text = "".join((folder / file).read_text() for file in ("quantized.metal", f"{name}.metal"))
    if mx.cuda.is_available():
        text = (folder / "cuda.h").read_text() + text
        return mx.fast.cuda_kernel(  # type: ignore[return-value]
            name=name, input_names=inputs, output_names=outputs, source=body, header=text
        )
    return mx.fast.metal_kernel(  # type: ignore[return-value]
        name=name, input_names=inputs, output_names=outputs, source=body, header=text
    )
