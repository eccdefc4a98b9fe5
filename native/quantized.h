// Matrices in MLX's affine quantization, as operands.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"

namespace flashmoe {

// A stack of matrices, or a single one, which has no axis of slots.
struct Quantized {
  mlx::core::array weight;  // [slots, rows, columns * bits / 32], uint32
  mlx::core::array scales;  // [slots, rows, columns / group], float32, float16 or bfloat16
  mlx::core::array biases;  // [slots, rows, columns / group]
};

struct Format {
  int group, bits;

  bool operator==(const Format&) const = default;
};

// Throws std::invalid_argument unless groups and bits are supported.
void check(Format format);

// Throws std::invalid_argument unless the parts of the matrix fit each other and have these columns and axes: 2 for a
// single matrix, 3 for a stack.
void check(const Quantized& matrix, Format format, int columns, size_t ndim);

// The same for a matrix that is multiplied with x, float32 [..., columns].
void check(const Quantized& matrix, Format format, const mlx::core::array& x, size_t ndim);

// Takes weight, scales and biases from the inputs of an operation, and advances `next` behind them. Of a stack, this is
// the matrix in slot 0.
Matrix next_matrix(const std::vector<mlx::core::array>& inputs, size_t& next, Format format, int64_t columns);

}  // namespace flashmoe
