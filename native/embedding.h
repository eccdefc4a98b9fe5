// Embedding lookup in a quantized matrix, as a lazy MLX operation on the CPU.
#pragma once

#include "mlx/array.h"
#include "quantized.h"

namespace flashmoe {

// Rows of a matrix, dequantized to float32 [..., columns], for token numbers [...], uint32. Numbers past the last row
// give the last row.
mlx::core::array embed(const mlx::core::array& numbers, const Quantized& matrix, Format format);

}  // namespace flashmoe
