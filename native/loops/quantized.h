// Unpacking of quantized weights into SIMD lanes.
//
// A unit is the smallest whole number of 32-bit words that holds whole weights, and a block is one unit per lane.
// Weight k of all units of a block is extracted by one AND and one conversion to float, without a shift to the right:
// it stays multiplied by a power of two, by which the vector was divided in advance. Both are exact.
#pragma once

#include "kernels.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

template <int BITS>
struct Unit {
  static constexpr int words = BITS == 5 ? 5 : BITS == 3 || BITS == 6 ? 3 : 1;
  static constexpr int weights = 32 * words / BITS;
  static constexpr int block_weights = LANES * weights;

  static constexpr int shift(int k) {
    return k * BITS % 32;
  }

  // The power of two that weight k stays multiplied by. Weights that end at or cross a word's end have to be shifted.
  static constexpr float factor(int k) {
    return shift(k) + BITS < 32 ? static_cast<float>(1u << shift(k)) : 1.0f;
  }
};

// Deinterleave N registers of words: lane j of result I is word j * N + I. N is odd, so that the words of a result come
// from different lanes, and N - 1 blends and one permutation make it.
template <int N, int I, int V, size_t... LANE>
INLINE Words deinterleave(const Words* v, Words blended, std::index_sequence<LANE...>) {
  if constexpr (V == N) {
    return __builtin_shufflevector(blended, blended, (static_cast<int>(LANE) * N + I) % LANES...);
  } else {
    // Whether the result takes this lane of register V.
    constexpr auto is_taken = [](int lane) {
      for (int j = 0; j < LANES; ++j) {
        if ((j * N + I) % LANES == lane) return (j * N + I) / LANES == V;
      }
      return false;
    };
    Words next = __builtin_shufflevector(
        blended, v[V], (static_cast<int>(LANE) + (is_taken(static_cast<int>(LANE)) ? LANES : 0))...);
    return deinterleave<N, I, V + 1>(v, next, std::make_index_sequence<LANES>());
  }
}

// Load a block: units[i] has word i of each lane's unit.
template <int N, size_t... I>
INLINE void load_units(const uint32_t* from, Words (&units)[N], std::index_sequence<I...>) {
  if constexpr (N == 1) {
    units[0] = load<Words>(from);
  } else {
    Words v[N];
    ((v[I] = load<Words>(from + I * LANES)), ...);
    ((units[I] = deinterleave<N, I, 1>(v, v[0], std::make_index_sequence<LANES>())), ...);
  }
}

// Weight K of each unit, times Unit::factor(K).
template <int BITS, int K>
INLINE Floats unpack(const Words (&units)[Unit<BITS>::words]) {
  constexpr int word = K * BITS / 32, shift = Unit<BITS>::shift(K);
  constexpr uint32_t mask = (1u << BITS) - 1;
  Words q;
  if constexpr (shift + BITS < 32) {
    q = units[word] & (mask << shift);
  } else if constexpr (shift + BITS == 32) {
    q = units[word] >> shift;
  } else {
    q = (units[word] >> shift | units[word + 1] << (32 - shift)) & mask;
  }
  return __builtin_convertvector((Ints)q, Floats);
}

// The scale of each lane's unit; SHARE neighboring lanes are of one group.
template <int SHARE, size_t... LANE>
INLINE Floats spread(const float* scales, std::index_sequence<LANE...>) {
  if constexpr (SHARE >= LANES) {
    return Floats{((void)LANE, *scales)...};
  } else {
    Floats loaded = load<Floats>(scales);
    return __builtin_shufflevector(loaded, loaded, (static_cast<int>(LANE) / SHARE)...);
  }
}

template <typename Stored>
INLINE Floats widen_register(const void* from) {
  if constexpr (sizeof(Stored) == sizeof(float)) {
    return load<Floats>(from);
  } else {
    typedef Stored Halves __attribute__((vector_size(2 * LANES)));
    if constexpr (__is_same(Stored, uint16_t)) {
      // bfloat16 is the upper half of a float32.
      return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
    } else {
      return __builtin_convertvector(load<Halves>(from), Floats);
    }
  }
}

// Convert scales or biases to float32, and write LANES zeros behind them, so that whole registers can be loaded.
template <typename Stored>
INLINE void widen(const void* stored, int64_t first, int64_t count, float* out) {
  const Stored* from = static_cast<const Stored*>(stored) + first;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    store(out + i, widen_register<Stored>(from + i));
  }
  Stored rest[LANES] = {};
  __builtin_memcpy(rest, from + i, (count - i) * sizeof(Stored));
  store(out + i, widen_register<Stored>(rest));
  store(out + count, Floats{});
}

INLINE void widen(const void* stored, Scales dtype, int64_t first, int64_t count, float* out) {
  switch (dtype) {
    case Scales::float32: return widen<float>(stored, first, count, out);
    case Scales::float16: return widen<_Float16>(stored, first, count, out);
    case Scales::bfloat16: return widen<uint16_t>(stored, first, count, out);
  }
}

}  // namespace
}  // namespace flashmoe
