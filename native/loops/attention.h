// Softmax attention, and the gate of its output.
#pragma once

#include "kernels.h"
#include "loops/softmax.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

void attention(
    const float* const* queries,
    const float* keys,
    int64_t key_stride,
    const float* values,
    int64_t value_stride,
    const int64_t* seen,
    int64_t size,
    float scale,
    float* weights,
    int64_t stride,
    float* const* out) {
  constexpr int ROWS = ATTENTION_ROWS;
  int64_t longest = 0;
  for (int row = 0; row < ROWS; ++row) {
    longest = seen[row] > longest ? seen[row] : longest;
  }
  // A key, and below a value, is loaded once for all rows. Masked scores are computed, too, and then overwritten.
  for (int64_t key = 0; key < longest; ++key) {
    Floats product[ROWS] = {};
    for (int64_t i = 0; i < size; i += LANES) {
      const Floats value = load<Floats>(keys + key * key_stride + i);
      for (int row = 0; row < ROWS; ++row) {
        product[row] += load<Floats>(queries[row] + i) * value;
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      weights[row * stride + key] = sum(product[row]);
    }
  }
  float total[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    total[row] = softmax_numerators(weights + row * stride, seen[row], round_up(longest, LANES), scale);
  }
  for (int64_t i = 0; i < size; i += LANES) {
    Floats mean[ROWS] = {};
    for (int64_t key = 0; key < longest; ++key) {
      const Floats value = load<Floats>(values + key * value_stride + i);
      for (int row = 0; row < ROWS; ++row) {
        mean[row] += weights[row * stride + key] * value;
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      store(out[row] + i, mean[row] / total[row]);
    }
  }
}

void sigmoid_gate(float* x, const float* gate, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE {
    store(x + i, load(x + i) * sigmoid(load(gate + i)));
  });
}

}  // namespace
}  // namespace flashmoe
