// SIMD vectors of LANES floats, and the arithmetic that all loops share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace flashmoe {
namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

template <typename T>
INLINE T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Floats value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Halves are added until one lane is left.
template <int HALF, size_t... LANE>
INLINE float fold(Floats v, std::index_sequence<LANE...> lanes) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    return fold<HALF / 2>(v + __builtin_shufflevector(v, v, (static_cast<int>(LANE) ^ HALF)...), lanes);
  }
}

INLINE float sum(Floats v) {
  return fold<LANES / 2>(v, std::make_index_sequence<LANES>());
}

INLINE int64_t padded(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// exp(x) for x <= 0, within two units in the last place; 0 where a float32 would be subnormal.
INLINE Floats exp_of_negative(Floats x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? Floats{} : x;
  Floats n = x * 1.44269504f - 0.5f;
  const Ints power = __builtin_convertvector(n, Ints);  // rounded towards 0, so to the nearest
  n = __builtin_convertvector(power, Floats);
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return tiny ? Floats{} : y * (Floats)((power + 127) << 23);
}

INLINE Floats sigmoid(Floats x) {
  const Floats y = exp_of_negative(x > 0.0f ? -x : x);
  return (x > 0.0f ? Floats{} + 1.0f : y) / (y + 1.0f);
}

// Call each(place, load, store) for all places of rows of `size` floats; behind their end there are zeros, and what is
// stored there is dropped.
template <typename F>
INLINE void for_each(int64_t size, F&& each) {
  const auto load_all = [](const float* from) __attribute__((always_inline)) { return load<Floats>(from); };
  const auto store_all = [](float* to, Floats value) __attribute__((always_inline)) { store(to, value); };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    each(i, load_all, store_all);
  }
  if (const int64_t rest = size - i) {
    each(
        i,
        [rest](const float* from) __attribute__((always_inline)) {
          Floats value = {};
          __builtin_memcpy(&value, from, rest * sizeof(float));
          return value;
        },
        [rest](float* to, Floats value) __attribute__((always_inline)) {
          __builtin_memcpy(to, &value, rest * sizeof(float));
        });
  }
}

}  // namespace
}  // namespace flashmoe
