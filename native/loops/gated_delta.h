// GatedDeltaNet between its projections.
#pragma once

#include "loops/norm.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

template <size_t... LANE>
INLINE Floats every_other(Floats a, Floats b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(LANE) * 2)...);
}

template <size_t... LANE>
INLINE Floats the_others(Floats a, Floats b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(LANE) * 2 + 1)...);
}

void convolve(const float* const* inputs, const float* weights, int64_t taps, int64_t size, float* out) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  int64_t i = 0;
  for (; taps == 4 && i + LANES <= size; i += LANES) {  // as models have it
    const float* const w = weights + i * 4;
    const Floats a = load<Floats>(w), b = load<Floats>(w + LANES);
    const Floats c = load<Floats>(w + 2 * LANES), d = load<Floats>(w + 3 * LANES);
    const Floats ab = every_other(a, b, lanes), cd = every_other(c, d, lanes);
    const Floats ba = the_others(a, b, lanes), dc = the_others(c, d, lanes);
    Floats total = load<Floats>(inputs[0] + i) * every_other(ab, cd, lanes);
    total += load<Floats>(inputs[1] + i) * every_other(ba, dc, lanes);
    total += load<Floats>(inputs[2] + i) * the_others(ab, cd, lanes);
    total += load<Floats>(inputs[3] + i) * the_others(ba, dc, lanes);
    store(out + i, total * sigmoid(total));
  }
  for (; i < size; ++i) {
    Floats total = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      total[0] += inputs[tap][i] * weights[i * taps + tap];
    }
    out[i] = (total * sigmoid(total))[0];
  }
}

void normalize(float* x, int64_t size, float eps, float scale) {
  const float factor = scale / __builtin_sqrtf(static_cast<float>(sum_of_squares(x, size)) + eps);
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    store(x + i, load(x + i) * factor);
  });
}

void gated_norm(float* x, const float* weight, float eps, const float* gate, int64_t size) {
  const float factor = rms_factor(x, size, eps);
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Floats z = load(gate + i);
    store(x + i, load(x + i) * (factor * load(weight + i) * (z * sigmoid(z))));
  });
}

void delta_step(
    const float* before,
    float* state,
    int64_t values,
    int64_t keys,
    const float* q,
    const float* k,
    const float* v,
    float g,
    float beta,
    float* out) {
  for (int64_t value = 0; value < values; ++value, before += keys, state += keys) {
    Floats recalled = {};
    for (int64_t key = 0; key < keys; key += LANES) {
      Floats decayed = load<Floats>(before + key) * g;
      store(state + key, decayed);
      recalled += decayed * load<Floats>(k + key);
    }
    const float delta = (v[value] - sum(recalled)) * beta;
    Floats answer = {};
    for (int64_t key = 0; key < keys; key += LANES) {
      Floats learnt = load<Floats>(state + key) + load<Floats>(k + key) * delta;
      store(state + key, learnt);
      answer += learnt * load<Floats>(q + key);
    }
    out[value] = sum(answer);
  }
}

}  // namespace
}  // namespace flashmoe
