"""Parts of Transformers' Qwen3.5-MoE in fewer operations and less traffic, for training on one GPU.

Each computes what Transformers' own does.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

CHUNK = 64  # tokens


def replace_in_transformers() -> None:
    """Let every Qwen3.5-MoE of Transformers compute with what is here."""
    modeling.causal_conv1d_fn = convolve
    modeling.torch_chunk_gated_delta_rule = delta_rule
    modeling.Qwen3_5MoeExperts.forward = experts


def convolve(x: Tensor, weight: Tensor, bias: None = None, activation: str = "silu", **_: Any) -> Tensor:
    """The causal depthwise convolution of GatedDeltaNet as shifts and sums: PyTorch's own is slow to differentiate."""
    length = x.shape[-1]
    padded = nn.functional.pad(x, (weight.shape[-1] - 1, 0))
    taps = (padded[..., tap : tap + length] * weight[:, tap, None] for tap in range(weight.shape[-1]))
    return nn.functional.silu(sum(taps, torch.zeros_like(x)))


class _Rows(torch.autograd.Function):
    """Rows of a matrix in another order, each as often as any other: so its gradient is another gather and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """``x[rows]``; in ``places`` of it are the copies of the first row, then those of the second, ..."""
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Each row has the gradients of its copies."""
        (places,) = ctx.saved_tensors
        found = gradient[places]
        return (found if len(found) == ctx.count else found.unflatten(0, (ctx.count, -1)).sum(1)), None, None


def experts(self: nn.Module, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
    """The weighted sum of each token's experts, all pairs of a token and an expert sorted by expert."""
    order = chosen.flatten().argsort()
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(self.num_experts, device=order.device)
    ends = torch.searchsorted(chosen.flatten()[order], numbers, right=True).int()
    y = moe._grouped_linear(_Rows.apply(x, order // chosen.shape[-1], places), self.gate_up_proj, ends)
    y = moe._grouped_linear(_swiglu(y), self.down_proj, ends)
    return _weighted(_Rows.apply(y, places, order).view(*chosen.shape, -1), scores)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return nn.functional.silu(gate) * up


def _weighted(y: Tensor, scores: Tensor) -> Tensor:
    return (y.float() * scores[..., None].float()).sum(1).to(y.dtype)


class _Inverse(torch.autograd.Function):
    """The inverses of lower triangular matrices with ones on the diagonal."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        """Blocks on the diagonal twice as large each time: [[A, 0], [C, B]] has -1/B C 1/A in its corner."""
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
        """What is above the diagonal is zero whatever its gradient."""
        (inverses,) = ctx.saved_tensors
        return -(inverses.mT @ gradient @ inverses.mT).tril(-1)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    """The gated delta rule from an empty state; only states go chunk by chunk.

    Within a chunk the values written are w - k S, with S the state before it: so the next state is linear in S too.
    """
    length = value.shape[1]
    asked, pairs, written, read, change, news = _within_chunks(query, key, value, g, beta)
    states = [torch.zeros_like(news[:, :, 0])]
    for old, new in zip(change.unbind(2)[:-1], news.unbind(2), strict=False):
        states.append(torch.baddbmm(new.flatten(0, 1), old.flatten(0, 1), states[-1].flatten(0, 1)).view_as(new))
    state = torch.stack(states, 2)
    out = (asked @ state + pairs @ (written - read @ state)).flatten(2, 3).transpose(1, 2)
    return out[:, :length].to(query.dtype, memory_format=torch.contiguous_format), None


def _within_chunks(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What chunks need no state for: ``[batch, heads, chunks, ...]`` in float32."""

    def chunks(x: Tensor) -> Tensor:
        x = nn.functional.pad(x.transpose(1, 2).float(), (0, 0, 0, -x.shape[1] % CHUNK))
        return x.unflatten(2, (-1, CHUNK))

    query, key, value = chunks(query), chunks(key), chunks(value)
    beta, decay = chunks(beta[..., None]), chunks(g[..., None]).cumsum(3)
    query = query * (query.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * query.shape[-1] ** -0.5
    key = key * (key.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    share = value.shape[1] // key.shape[1]  # of values' heads: some versions of Transformers repeat keys, others do not
    query, key = query.repeat_interleave(share, 1), key.repeat_interleave(share, 1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=key.device).triu(1)
    pairs = (decay - decay.mT).masked_fill(later, -math.inf).exp()

    inverse = _Inverse.apply((key * beta) @ key.mT * pairs)
    written, read = (inverse @ torch.cat([value * beta, key * (beta * decay.exp())], -1)).split(
        [value.shape[-1], key.shape[-1]], -1
    )
    kept = (key * (decay[..., -1:, :] - decay).exp()).mT
    change = decay[..., -1:, :].exp() * torch.eye(key.shape[-1], device=key.device) - kept @ read
    return query * decay.exp(), query @ key.mT * pairs, written, read, change, kept @ written
