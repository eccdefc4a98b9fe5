// Products with quantized matrices on all threads.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "kernels.h"

namespace flashmoe {

// Products of vectors and matrices: out[pair] = matrix[slot] x, or silu(matrix[slot] x) * (up[slot] x) if there is an
// up matrix. Without slots there is one matrix, and a pair for each vector.
struct Product {
  Matrix matrix;             // in slot 0
  std::optional<Matrix> up;  // in slot 0
  const uint32_t* slots;     // [pairs]
  const float* x;            // [vectors, columns]
  int64_t vectors;
  int64_t pairs;  // a multiple of vectors
  float* out;     // [pairs, rows]
};

// Compute products, all of them in one parallel loop. A slot 0xffffffff is that of an expert which is not in memory:
// its results are zero.
void multiply(std::span<const Product> products);

}  // namespace flashmoe
