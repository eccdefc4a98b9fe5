// Softmax attention.
#pragma once

#include "kernels.h"
#include "loops/softmax.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

void gate(float* x, const float* gate, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    store(x + i, load(x + i) * sigmoid(load(gate + i)));
  });
}

void attend(
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
  int64_t most = 0;
  for (int row = 0; row < ROWS; ++row) {
    most = seen[row] > most ? seen[row] : most;
  }
  for (int64_t key = 0; key < most; ++key) {
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
    total[row] = soften(weights + row * stride, seen[row], padded(most, LANES), scale);
  }
  for (int64_t i = 0; i < size; i += LANES) {
    Floats mean[ROWS] = {};
    for (int64_t key = 0; key < most; ++key) {
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

}  // namespace
}  // namespace flashmoe
