// GatedDeltaNet between its projections, as one lazy MLX operation on the CPU.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// Where a row of projections has queries, keys, values, gates of the output, betas and decays: for each of these six the
// first column of key head 0, and how many columns further the next key head has its own.
using DeltaLayout = std::array<std::pair<int, int>, 6>;

// Convolution over time, SiLU, normalised queries and keys, the gated delta rule, and the gated norm of what it returns;
// formulas are those of mlx-lm's qwen3_5.GatedDeltaNet and gated_delta.py. All arrays are float32.
//
//   x            [batch, tokens, width]: what is projected
//   window       [batch, taps - 1, channels]: the inputs of the convolution before these: of all heads queries, keys, values
//   state        [batch, value_heads, values, keys]
//   taps         [channels, taps, 1]
//   a_log, dt_bias [value_heads]
//   norm         [values]
//
// Returns outputs [batch, tokens, value_heads * values], and what window and state are after them.
std::vector<mlx::core::array> delta_net(
    const mlx::core::array& x,
    const mlx::core::array& window,
    const mlx::core::array& state,
    const mlx::core::array& taps,
    const mlx::core::array& a_log,
    const mlx::core::array& dt_bias,
    const mlx::core::array& norm,
    const DeltaLayout& layout,
    float eps);

}  // namespace flashmoe
