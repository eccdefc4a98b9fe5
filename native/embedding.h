// Rows of a quantised matrix as one lazy MLX operation on the CPU.
#pragma once

#include "mlx/array.h"
#include "products.h"

namespace flashmoe {

// [..., columns], float32: row `numbers` [...], uint32, of a matrix. A number that is too large means the last row.
mlx::core::array embed(const mlx::core::array& numbers, const Quantized& matrix, Format format);

}  // namespace flashmoe
