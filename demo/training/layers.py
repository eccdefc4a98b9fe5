"""Faster forward and backward passes for parts of Transformers' Qwen3.5-MoE, for training on one GPU.

Each function computes what the Transformers function that it replaces does, in fewer operations and with less memory
traffic.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

# Tokens in a chunk of the gated delta rule.
CHUNK = 64


def replace_in_transformers() -> None:
    """Make every Qwen3.5-MoE of this process use the functions of this module."""
    modeling.causal_conv1d_fn = causal_conv
    modeling.torch_chunk_gated_delta_rule = gated_delta_rule
    modeling.Qwen3_5MoeExperts.forward = experts


def causal_conv(x: Tensor, weight: Tensor, bias: None = None, activation: str = "silu", **_: Any) -> Tensor:
    """Apply the causal depthwise convolution of GatedDeltaNet and SiLU to ``x``, ``[batch, channels, tokens]``.

    Shifted products are summed, because the backward pass of PyTorch's own depthwise convolution is slow.
    """
    length = x.shape[-1]
    padded = nn.functional.pad(x, (weight.shape[-1] - 1, 0))
    taps = (padded[..., tap : tap + length] * weight[:, tap, None] for tap in range(weight.shape[-1]))
    return nn.functional.silu(sum(taps, torch.zeros_like(x)))


class _GatherRows(torch.autograd.Function):
    """Gather rows of a matrix, each equally often, so that the backward pass is a gather and a sum.

    The backward pass of indexing sorts the indices instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, copies: Tensor) -> Tensor:
        """Return ``x[rows]``; ``copies`` has the positions in it of the first row, then those of the second, ..."""
        ctx.save_for_backward(copies)
        ctx.count = len(x)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Sum the gradients of each row's copies."""
        (copies,) = ctx.saved_tensors
        gathered = gradient[copies]
        if len(gathered) != ctx.count:
            gathered = gathered.unflatten(0, (ctx.count, -1)).sum(1)
        return gathered, None, None


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, from grouped matmuls over pairs sorted by expert.

    Args:
        self (Any): Transformers' ``Qwen3_5MoeExperts``.
        hidden_states (Tensor): Inputs, ``[tokens, hidden]``.
        top_k_index (Tensor): Experts of each token, ``[tokens, top_k]``.
        top_k_weights (Tensor): Their weights, ``[tokens, top_k]``.

    Returns:
        Tensor: Outputs, ``[tokens, hidden]``.
    """
    top_k = top_k_index.shape[-1]
    order = top_k_index.flatten().argsort()
    inverse_order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    expert_ids = torch.arange(self.num_experts, device=order.device)
    group_ends = torch.searchsorted(top_k_index.flatten()[order], expert_ids, right=True).int()
    sorted_inputs = _GatherRows.apply(hidden_states, order // top_k, inverse_order)
    y = moe._grouped_linear(sorted_inputs, self.gate_up_proj, group_ends)
    y = moe._grouped_linear(_swiglu(y), self.down_proj, group_ends)
    y = _GatherRows.apply(y, inverse_order, order).view(*top_k_index.shape, -1)
    return (y.float() * top_k_weights[..., None].float()).sum(1).to(y.dtype)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return nn.functional.silu(gate) * up


class _Inverse(torch.autograd.Function):
    """Invert lower triangular matrices with a unit diagonal."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        """Invert diagonal blocks of doubling size: the corner of the inverse of [[A, 0], [C, B]] is -1/B C 1/A."""
        size = matrices.shape[-1]
        row = torch.arange(size, device=matrices.device)
        inverses = torch.eye(size, device=matrices.device, dtype=matrices.dtype).expand_as(matrices)
        for bit in range((size - 1).bit_length()):
            half = row >> bit
            corners = (half[:, None] == half + 1) & (half % 2 == 0)
            inverses = inverses - inverses @ (matrices * corners) @ inverses
        ctx.save_for_backward(inverses)
        return inverses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient below the diagonal; the rest of the matrices is constant."""
        (inverses,) = ctx.saved_tensors
        return -(inverses.mT @ gradient @ inverses.mT).tril(-1)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Apply the gated delta rule from an empty state, chunk by chunk.

    Both the values that a chunk writes and the state after it are linear in the state before it. Only the states are
    therefore computed one after another, everything else for all chunks at once.

    Args:
        query (Tensor): Queries, ``[batch, tokens, key_heads, key_dim]``.
        key (Tensor): Keys, of the same shape.
        value (Tensor): Values, ``[batch, tokens, heads, value_dim]``.
        g (Tensor): Logarithms of the decay, ``[batch, tokens, heads]``.
        beta (Tensor): Write strengths, ``[batch, tokens, heads]``.

    Returns:
        tuple[Tensor, None]: Outputs, ``[batch, tokens, heads, value_dim]``, and no state.
    """
    length = value.shape[1]
    query_decayed, scores, written, read, transition, update = _within_chunks(query, key, value, g, beta)
    states = [torch.zeros_like(update[:, :, 0])]
    for old, new in zip(transition.unbind(2)[:-1], update.unbind(2), strict=False):
        states.append(torch.baddbmm(new.flatten(0, 1), old.flatten(0, 1), states[-1].flatten(0, 1)).view_as(new))
    state = torch.stack(states, 2)
    out = (query_decayed @ state + scores @ (written - read @ state)).flatten(2, 3).transpose(1, 2)
    return out[:, :length].to(query.dtype, memory_format=torch.contiguous_format), None


def _within_chunks(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """Compute what depends on no state, in float32.

    Returns:
        tuple[Tensor, ...]: Six tensors of ``[batch, heads, chunks, ...]``: the decayed queries; their scores with the
        keys of the chunk; ``written`` and ``read``, of which the chunk writes ``written - read @ state``; and
        ``transition`` and ``update``, with which the next state is ``transition @ state + update``.
    """

    def chunks(x: Tensor) -> Tensor:
        x = nn.functional.pad(x.transpose(1, 2).float(), (0, 0, 0, -x.shape[1] % CHUNK))
        return x.unflatten(2, (-1, CHUNK))

    query, key, value = chunks(query), chunks(key), chunks(value)
    beta, decay = chunks(beta[..., None]), chunks(g[..., None]).cumsum(3)
    query = query * (query.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * query.shape[-1] ** -0.5
    key = key * (key.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    # Some versions of Transformers repeat the heads of keys before the call, others do not.
    heads_per_key = value.shape[1] // key.shape[1]
    query, key = query.repeat_interleave(heads_per_key, 1), key.repeat_interleave(heads_per_key, 1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=key.device).triu(1)
    relative_decay = (decay - decay.mT).masked_fill(later, -math.inf).exp()

    inverse = _Inverse.apply((key * beta) @ key.mT * relative_decay)
    written, read = (inverse @ torch.cat([value * beta, key * (beta * decay.exp())], -1)).split(
        [value.shape[-1], key.shape[-1]], -1
    )
    key_decayed = (key * (decay[..., -1:, :] - decay).exp()).mT
    transition = decay[..., -1:, :].exp() * torch.eye(key.shape[-1], device=key.device) - key_decayed @ read
    scores = query @ key.mT * relative_decay
    return query * decay.exp(), scores, written, read, transition, key_decayed @ written
