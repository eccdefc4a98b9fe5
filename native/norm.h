// RMS norms, and what ends with one, as lazy MLX operations on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// x / sqrt(mean(x^2) + eps) * weight, along the last axis; x [..., size] and weight [size] are float32.
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps);

// x + y, both float32 [..., size], and its norm.
std::vector<mlx::core::array> add_norm(
    const mlx::core::array& x, const mlx::core::array& y, const mlx::core::array& weight, float eps);

// x + sum over k of scores[k] * y[k] + scores[last] * shared, and its norm: x and shared [..., size], y [..., top_k, size]
// and scores [..., top_k + 1] are float32.
std::vector<mlx::core::array> combine(
    const mlx::core::array& x,
    const mlx::core::array& y,
    const mlx::core::array& scores,
    const mlx::core::array& shared,
    const mlx::core::array& weight,
    float eps);

}  // namespace flashmoe
