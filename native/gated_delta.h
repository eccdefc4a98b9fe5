// GatedDeltaNet between its projections, as one lazy MLX operation on the CPU.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// Where a row of projections has queries, keys, values, output gates, betas and decays: for each of these six the first
// column of key head 0, and the distance in columns from one key head to the next.
using DeltaLayout = std::array<std::pair<int, int>, 6>;

// Convolution over time, SiLU, L2 norms of queries and keys, the gated delta rule, and the gated norm of its output, as
// mlx-lm's qwen3_5.GatedDeltaNet and gated_delta.py compute them. All arrays are float32:
//
//   x        [batch, tokens, width], the projections
//   window   [batch, taps - 1, channels], the last inputs of the convolution: queries, keys and values of all heads
//   state    [batch, value_heads, values, keys]
//   taps     [channels, taps, 1]
//   a_log    [value_heads]
//   dt_bias  [value_heads]
//   norm     [values]
//
// Returns [batch, tokens, value_heads * values], and the next window and state.
std::vector<mlx::core::array> gated_delta(
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
