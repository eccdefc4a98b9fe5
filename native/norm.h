// RMS norms, and the sums that they follow, as lazy MLX operations on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// x / sqrt(mean(x^2) + eps) * weight along the last axis, for float32 x [..., size] and weight [size].
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps);

// A residual connection, x + y for float32 [..., size], and its RMS norm.
std::vector<mlx::core::array> add_norm(
    const mlx::core::array& x, const mlx::core::array& y, const mlx::core::array& weight, float eps);

// The end of a layer of experts, x + sum over k of scores[k] * y[k] + scores[top_k] * shared, and its RMS norm. All are
// float32: x and shared [..., size], y [..., top_k, size], scores [..., top_k + 1].
std::vector<mlx::core::array> combine(
    const mlx::core::array& x,
    const mlx::core::array& y,
    const mlx::core::array& scores,
    const mlx::core::array& shared,
    const mlx::core::array& weight,
    float eps);

}  // namespace flashmoe
