// GatedDeltaNet between its projections.
#pragma once

#include "loops/norm.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

template <size_t... LANE>
INLINE Floats even_lanes(Floats a, Floats b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(LANE) * 2)...);
}

template <size_t... LANE>
INLINE Floats odd_lanes(Floats a, Floats b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(LANE) * 2 + 1)...);
}

void convolve(const float* const* inputs, const float* weights, int64_t taps, int64_t size, float* out) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  int64_t i = 0;
  // Models have four taps. The weights of LANES channels are transposed in registers, from [LANES][4] to [4][LANES].
  for (; taps == 4 && i + LANES <= size; i += LANES) {
    const float* const w = weights + i * 4;
    const Floats a = load<Floats>(w), b = load<Floats>(w + LANES);
    const Floats c = load<Floats>(w + 2 * LANES), d = load<Floats>(w + 3 * LANES);
    const Floats ab = even_lanes(a, b, lanes), cd = even_lanes(c, d, lanes);
    const Floats ba = odd_lanes(a, b, lanes), dc = odd_lanes(c, d, lanes);
    Floats total = load<Floats>(inputs[0] + i) * even_lanes(ab, cd, lanes);
    total += load<Floats>(inputs[1] + i) * even_lanes(ba, dc, lanes);
    total += load<Floats>(inputs[2] + i) * odd_lanes(ab, cd, lanes);
    total += load<Floats>(inputs[3] + i) * odd_lanes(ba, dc, lanes);
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

void l2_normalize(float* x, int64_t size, float eps, float scale) {
  const float factor = scale / __builtin_sqrtf(static_cast<float>(sum_of_squares(x, size)) + eps);
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE { store(x + i, load(x + i) * factor); });
}

void gated_delta_step(
    const float* before,
    float* state,
    int64_t values,
    int64_t keys,
    const float* q,
    const float* k,
    const float* v,
    float decay,
    float beta,
    float* out) {
  for (int64_t value = 0; value < values; ++value, before += keys, state += keys) {
    Floats prediction = {};
    for (int64_t key = 0; key < keys; key += LANES) {
      Floats decayed = load<Floats>(before + key) * decay;
      store(state + key, decayed);
      prediction += decayed * load<Floats>(k + key);
    }
    const float delta = (v[value] - sum(prediction)) * beta;
    Floats output = {};
    for (int64_t key = 0; key < keys; key += LANES) {
      Floats updated = load<Floats>(state + key) + load<Floats>(k + key) * delta;
      store(state + key, updated);
      output += updated * load<Floats>(q + key);
    }
    out[value] = sum(output);
  }
}

void gated_norm(float* x, const float* weight, float eps, const float* gate, int64_t size) {
  const float factor = rms_factor(x, size, eps);
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE {
    const Floats z = load(gate + i);
    store(x + i, load(x + i) * (factor * load(weight + i) * (z * sigmoid(z))));
  });
}

}  // namespace
}  // namespace flashmoe
