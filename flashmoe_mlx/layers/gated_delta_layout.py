"""Column layout of GatedDeltaNet's projections."""

import mlx.nn as nn
from mlx_lm.models import qwen3_5

from flashmoe_mlx.ops.gated_delta import Layout


def layout_of(mixer: nn.Module) -> Layout:
    """Return where the concatenated projections of a Qwen3.5 or Qwen3-Next GatedDeltaNet have their columns."""
    heads, key_dim, value_dim = mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    share = mixer.num_v_heads // heads
    # Columns of one key head: queries, keys, values, output gates, betas, decays.
    sizes = (key_dim, key_dim, share * value_dim, share * value_dim, share, share)
    starts = [sum(sizes[:part]) for part in range(6)]
    if isinstance(mixer, qwen3_5.GatedDeltaNet):
        # All heads' queries, then all heads' keys, and so on.
        return tuple((heads * start, size) for start, size in zip(starts, sizes, strict=True))
    # Qwen3-Next: one key head's queries, keys, values and gates, then the next head's; then betas and decays.
    stride = starts[4]
    return tuple([(start, stride) for start in starts[:4]] + [(heads * stride + i * share, 2 * share) for i in (0, 1)])
