// The root mean square norm as one lazy MLX operation on the CPU.
#pragma once

#include "mlx/array.h"

namespace flashmoe {

// x / sqrt(mean(x^2) + eps) * weight, along the last axis; x [..., size] and weight [size] are float32.
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps);

}  // namespace flashmoe
