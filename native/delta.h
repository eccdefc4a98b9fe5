// GatedDeltaNet between its projections, as one lazy MLX operation on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// Convolution over time, SiLU, normalised queries and keys, the gated delta rule, and the gated norm of what it returns;
// formulas are those of mlx-lm's qwen3_5.GatedDeltaNet and gated_delta.py. All arrays are float32.
//
//   qkv          [batch, tokens, channels], channels = 2 * key_heads * keys + value_heads * values
//   z            [batch, tokens, value_heads * values]
//   a, b         [batch, tokens, value_heads]
//   recent       [batch, kernel - 1, channels]: the inputs of the convolution before these
//   state        [batch, value_heads, values, keys]
//   convolution  [channels, kernel, 1]
//   a_log, dt_bias [value_heads]
//   norm         [values]
//
// Returns outputs [batch, tokens, value_heads * values], and what recent and state are after them.
std::vector<mlx::core::array> delta_net(
    const mlx::core::array& qkv,
    const mlx::core::array& z,
    const mlx::core::array& a,
    const mlx::core::array& b,
    const mlx::core::array& recent,
    const mlx::core::array& state,
    const mlx::core::array& convolution,
    const mlx::core::array& a_log,
    const mlx::core::array& dt_bias,
    const mlx::core::array& norm,
    int key_heads,
    float norm_eps);

}  // namespace flashmoe
