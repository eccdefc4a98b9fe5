// SIMD vectors of LANES floats, by the vector extensions of GCC and Clang, and the math that all loops share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace flashmoe {
namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <typename T>
INLINE T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Floats value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Horizontal sum: each step adds lanes that are HALF apart, until lane 0 has the total.
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

INLINE int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// exp(x) for x <= 0, within 2 ulp. Results that would be subnormal are 0.
INLINE Floats exp_of_negative(Floats x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? Floats{} : x;
  // x = n * log(2) + r. The conversion truncates toward zero, so that for n <= 0 subtracting 0.5 rounds to nearest.
  Floats n = x * 1.44269504f - 0.5f;
  const Ints power = __builtin_convertvector(n, Ints);
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

// Call each(i, load, store) for every register of an array of `size` floats, where i is its first element. At the end
// of the array load() fills up with zeros and store() writes only the elements that exist.
template <typename F>
INLINE void for_each(int64_t size, F&& each) {
  const auto load_all = [](const float* from) ALWAYS_INLINE { return load<Floats>(from); };
  const auto store_all = [](float* to, Floats value) ALWAYS_INLINE { store(to, value); };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    each(i, load_all, store_all);
  }
  if (const int64_t nbytes = (size - i) * sizeof(float)) {
    const auto load_rest = [nbytes](const float* from) ALWAYS_INLINE {
      Floats value = {};
      __builtin_memcpy(&value, from, nbytes);
      return value;
    };
    const auto store_rest = [nbytes](float* to, Floats value) ALWAYS_INLINE { __builtin_memcpy(to, &value, nbytes); };
    each(i, load_rest, store_rest);
  }
}

}  // namespace
}  // namespace flashmoe
