// Softmax without its division, which attention and routing do where they use the result.
#pragma once

#include "loops/vectors.h"

namespace flashmoe {
namespace {

// Replace x by exp(scale * (x - max(x))) and return the sum, the denominator. Zeros follow from `size` to `end`, a
// multiple of LANES.
float softmax_numerators(float* x, int64_t size, int64_t end, float scale) {
  for (int64_t i = size; i < end; ++i) {
    x[i] = -__builtin_inff();
  }
  Floats largest = load<Floats>(x);
  for (int64_t i = LANES; i < end; i += LANES) {
    const Floats value = load<Floats>(x + i);
    largest = value > largest ? value : largest;
  }
  float max = largest[0];
  for (int lane = 1; lane < LANES; ++lane) {
    max = largest[lane] > max ? largest[lane] : max;
  }
  Floats total = {};
  for (int64_t i = 0; i < end; i += LANES) {
    const Floats numerator = exp_of_negative((load<Floats>(x + i) - max) * scale);
    store(x + i, numerator);
    total += numerator;
  }
  return sum(total);
}

}  // namespace
}  // namespace flashmoe
