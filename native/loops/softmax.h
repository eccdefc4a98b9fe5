// Softmax, as attention and routing need it.
#pragma once

#include "loops/vectors.h"

namespace flashmoe {
namespace {

// Weights of a row from its products, in place, with zeros behind them until `end`; the result is their sum.
float soften(float* weights, int64_t seen, int64_t end, float scale) {
  for (int64_t key = seen; key < end; ++key) {
    weights[key] = -__builtin_inff();
  }
  Floats best = load<Floats>(weights);
  for (int64_t key = LANES; key < end; key += LANES) {
    const Floats product = load<Floats>(weights + key);
    best = product > best ? product : best;
  }
  float most = best[0];
  for (int lane = 1; lane < LANES; ++lane) {
    most = best[lane] > most ? best[lane] : most;
  }
  Floats total = {};
  for (int64_t key = 0; key < end; key += LANES) {
    Floats weight = exp_of_negative((load<Floats>(weights + key) - most) * scale);
    store(weights + key, weight);
    total += weight;
  }
  return sum(total);
}

}  // namespace
}  // namespace flashmoe
