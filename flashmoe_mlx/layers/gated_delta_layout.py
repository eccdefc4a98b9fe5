"""Column layout of the fused GatedDeltaNet projections."""

import mlx.nn as nn
from mlx_lm.models import qwen3_5

from flashmoe_mlx.ops.gated_delta import Layout


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
