// RMS norms, and the sums that they follow.
#pragma once

#include "loops/vectors.h"

namespace flashmoe {
namespace {

typedef double Doubles __attribute__((vector_size(8 * LANES)));

INLINE double sum_of_squares(const float* x, int64_t size) {
  Doubles squares = {};
  for_each(size, [&](int64_t i, auto load, auto) ALWAYS_INLINE {
    const Doubles value = __builtin_convertvector(load(x + i), Doubles);
    squares += value * value;
  });
  double sum = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    sum += squares[lane];
  }
  return sum;
}

INLINE float rms_factor(const float* x, int64_t size, float eps) {
  return 1.0f / __builtin_sqrtf(static_cast<float>(sum_of_squares(x, size) / size) + eps);
}

void norm(const float* x, const float* y, const float* weight, float eps, int64_t size, float* sum, float* normed) {
  if (y) {
    for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE { store(sum + i, load(x + i) + load(y + i)); });
    x = sum;
  }
  const float factor = rms_factor(x, size, eps);
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE {
    store(normed + i, load(x + i) * factor * load(weight + i));
  });
}

void combine(
    const float* x, const float* y, const float* scores, int64_t count, const float* shared, int64_t size, float* out) {
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE {
    Floats total = {};
    for (int64_t k = 0; k < count; ++k) {
      total += load(y + k * size + i) * scores[k];
    }
    store(out + i, load(x + i) + (total + load(shared + i) * scores[count]));
  });
}

}  // namespace
}  // namespace flashmoe
