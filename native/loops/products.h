// Products of quantised matrices with float32 vectors.
//
// A row's product is sum over groups of scale * sum(q * x) + bias * sum(x). A block is a register of units, one in each
// lane; a unit is the least whole number of words that holds whole weights. So weight k of all units of a block is a
// register after one AND and one conversion: it is not even shifted to the right, because x has been divided by that
// power of two before. Vectors are arranged accordingly, once for all rows.
#pragma once

#include "kernels.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

constexpr int MOST_ROWS = LANES == 16 ? 4 : 2;  // of a tile: what the registers hold
constexpr int MOST_VECTORS = 4;
constexpr int AHEAD = 512;                      // words of a row that are asked of memory before their turn

template <int BITS>
struct Unit {
  static constexpr int words = BITS == 5 ? 5 : BITS == 3 || BITS == 6 ? 3 : 1;
  static constexpr int weights = 32 * words / BITS;
  static constexpr int block = LANES * weights;  // weights

  static constexpr int shift(int k) {
    return k * BITS % 32;
  }

  // By what x is divided instead of shifting weight k.
  static constexpr float divisor(int k) {
    return shift(k) + BITS < 32 ? static_cast<float>(1u << shift(k)) : 1.0f;
  }
};

// Lane j of result i is word j * N + i of N registers. N is odd, so that each register gives each lane once.
template <int N, int I, int V, size_t... LANE>
INLINE Words pick(const Words* v, Words chosen, std::index_sequence<LANE...>) {
  if constexpr (V == N) {
    return __builtin_shufflevector(chosen, chosen, (static_cast<int>(LANE) * N + I) % LANES...);
  } else {
    constexpr auto from_here = [](int place) {  // whether the lane at this place is wanted from register V
      for (int j = 0; j < LANES; ++j) {
        if ((j * N + I) % LANES == place) return (j * N + I) / LANES == V;
      }
      return false;
    };
    Words next = __builtin_shufflevector(
        chosen, v[V], (static_cast<int>(LANE) + (from_here(static_cast<int>(LANE)) ? LANES : 0))...);
    return pick<N, I, V + 1>(v, next, std::make_index_sequence<LANES>());
  }
}

template <int N, size_t... I>
INLINE void load_units(const uint32_t* from, Words (&units)[N], std::index_sequence<I...>) {
  if constexpr (N == 1) {
    units[0] = load<Words>(from);
  } else {
    Words v[N];
    ((v[I] = load<Words>(from + I * LANES)), ...);
    ((units[I] = pick<N, I, 1>(v, v[0], std::make_index_sequence<LANES>())), ...);
  }
}

// Weight K of each unit, times the divisor.
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

template <int BITS, int ROWS, int VECTORS, int K>
INLINE void add_weight(
    const Words (&units)[ROWS][Unit<BITS>::words], const float* const (&x)[VECTORS], Floats (&dot)[ROWS][VECTORS]) {
  Floats q[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    q[row] = unpack<BITS, K>(units[row]);
  }
  for (int t = 0; t < VECTORS; ++t) {
    Floats value = load<Floats>(x[t] + K * LANES);
    for (int row = 0; row < ROWS; ++row) {
      dot[row][t] = K == 0 ? q[row] * value : q[row] * value + dot[row][t];
    }
  }
}

template <int BITS, int ROWS, int VECTORS, size_t... K>
INLINE void add_block(
    const uint32_t* const (&weight)[ROWS],
    const float* const (&x)[VECTORS],
    Floats (&dot)[ROWS][VECTORS],
    std::index_sequence<K...>) {
  Words units[ROWS][Unit<BITS>::words];
  for (int row = 0; row < ROWS; ++row) {
    load_units(weight[row], units[row], std::make_index_sequence<Unit<BITS>::words>());
  }
  (add_weight<BITS, ROWS, VECTORS, K>(units, x, dot), ...);
}

// The scale of each lane's unit; SHARE lanes have one in common.
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
INLINE Floats widen_some(const void* from) {
  if constexpr (sizeof(Stored) == sizeof(float)) {
    return load<Floats>(from);
  } else {
    typedef Stored Few __attribute__((vector_size(2 * LANES)));
    if constexpr (__is_same(Stored, uint16_t)) {  // bfloat16: the upper half of a float32
      return (Floats)(__builtin_convertvector(load<Few>(from), Words) << 16);
    } else {
      return __builtin_convertvector(load<Few>(from), Floats);
    }
  }
}

// Scales as float32, with zeros behind them for as much as a register.
template <typename Stored>
INLINE void widen(const void* stored, int64_t first, int64_t count, float* out) {
  const Stored* from = static_cast<const Stored*>(stored) + first;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    store(out + i, widen_some<Stored>(from + i));
  }
  Stored rest[LANES] = {};
  __builtin_memcpy(rest, from + i, (count - i) * sizeof(Stored));
  store(out + i, widen_some<Stored>(rest));
  store(out + count, Floats{});
}

INLINE void widen(const void* stored, Scales as, int64_t first, int64_t count, float* out) {
  switch (as) {
    case Scales::float32: return widen<float>(stored, first, count, out);
    case Scales::float16: return widen<_Float16>(stored, first, count, out);
    case Scales::bfloat16: return widen<uint16_t>(stored, first, count, out);
  }
}

template <int BITS>
INLINE int64_t sums_at(const Matrix& matrix) {
  return padded(matrix.columns, Unit<BITS>::block);
}

// The rows of a chunk, with their scales and biases as float32.
struct Chunk {
  const uint32_t* weight;
  const float* scales;
  const float* biases;
};

// Rows are counted from the first of the chunk.
template <int BITS, int GROUP, int ROWS, int VECTORS>
void multiply_tile(
    const Matrix& matrix,
    const Chunk& chunk,
    const int64_t (&rows)[ROWS],
    const float* const* vectors,
    float* const* out) {
  using Unit = Unit<BITS>;
  constexpr auto each_weight = std::make_index_sequence<Unit::weights>();
  constexpr auto each_lane = std::make_index_sequence<LANES>();
  constexpr int share = GROUP / Unit::weights;  // lanes of a group
  const int64_t groups = matrix.columns / GROUP;
  const int64_t words = matrix.columns * BITS / 32;
  const int64_t blocks = words / (LANES * Unit::words);
  const int64_t rest = words % (LANES * Unit::words);

  const uint32_t* weight[ROWS];
  const float* x[VECTORS];
  const float* scales[ROWS];
  Floats total[ROWS][VECTORS] = {};
  for (int t = 0; t < VECTORS; ++t) {
    x[t] = vectors[t];
  }
  for (int row = 0; row < ROWS; ++row) {
    weight[row] = chunk.weight + rows[row] * words;
    scales[row] = chunk.scales + rows[row] * groups;
    for (int64_t g = 0; g < groups; g += LANES) {  // what is behind a row meets zeros behind the sums
      Floats bias = load<Floats>(chunk.biases + rows[row] * groups + g);
      for (int t = 0; t < VECTORS; ++t) {
        total[row][t] += bias * load<Floats>(x[t] + sums_at<BITS>(matrix) + g);
      }
    }
  }
  auto add = [&](int64_t block) __attribute__((always_inline)) {
    Floats dot[ROWS][VECTORS];
    add_block<BITS, ROWS, VECTORS>(weight, x, dot, each_weight);
    for (int row = 0; row < ROWS; ++row) {
      Floats scale = spread<share>(scales[row] + block * LANES / share, each_lane);
      for (int t = 0; t < VECTORS; ++t) {
        total[row][t] = scale * dot[row][t] + total[row][t];
      }
    }
  };
  for (int64_t block = 0; block < blocks; ++block) {
    add(block);
    for (int row = 0; row < ROWS; ++row) {
      weight[row] += LANES * Unit::words;
      __builtin_prefetch(weight[row] + AHEAD);
    }
    for (int t = 0; t < VECTORS; ++t) {
      x[t] += Unit::block;
    }
  }
  if (rest) {
    uint32_t last[ROWS][LANES * Unit::words] = {};
    for (int row = 0; row < ROWS; ++row) {
      __builtin_memcpy(last[row], weight[row], rest * sizeof(uint32_t));
      weight[row] = last[row];
    }
    add(blocks);
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int t = 0; t < VECTORS; ++t) {
      out[t][rows[row]] = sum(total[row][t]);
    }
  }
}

template <int BITS, int GROUP>
void multiply(
    const Matrix& matrix,
    int64_t begin,
    int64_t end,
    const float* const* x,
    float* const* out,
    int64_t vectors,
    float* scratch) {
  const int64_t groups = matrix.columns / GROUP;
  const int64_t rows = end - begin;
  float* const scales = scratch;
  float* const biases = scratch + padded(rows * groups + 2 * LANES, LANES);
  const int64_t words = matrix.columns * BITS / 32;
  const int64_t part = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const Chunk chunk = {matrix.weight + begin * words, scales, biases};
  for (int64_t i = 0; i < AHEAD; i += 16) {  // on their way while scales are widened
    for (int64_t row = 0; row < rows; row += part) {
      __builtin_prefetch(chunk.weight + row * words + i);
    }
  }
  widen(matrix.scales, matrix.stored, begin * groups, rows * groups, scales);
  widen(matrix.biases, matrix.stored, begin * groups, rows * groups, biases);

  // A tile that is short of rows or vectors is filled up with its last ones, which come out the same again.
  for (int64_t t = 0; t < vectors; t += MOST_VECTORS) {
    if (t + 1 == vectors) {
      // A row of each part: sums that need not wait for each other, and long ways through memory.
      for (int64_t row = 0; row < part; ++row) {
        int64_t some[MOST_ROWS];
        for (int i = 0; i < MOST_ROWS; ++i) {
          some[i] = row + i * part < rows ? row + i * part : rows - 1;
        }
        multiply_tile<BITS, GROUP, MOST_ROWS, 1>(matrix, chunk, some, x + t, out + t);
      }
      return;
    }
    // A few vectors with all rows, so that the vectors stay in the nearest cache.
    const float* some_x[MOST_VECTORS];
    float* some_out[MOST_VECTORS];
    for (int i = 0; i < MOST_VECTORS; ++i) {
      const int64_t vector = t + i < vectors ? t + i : vectors - 1;
      some_x[i] = x[vector];
      some_out[i] = out[vector];
    }
    for (int64_t row = 0; row < rows; row += MOST_ROWS) {
      int64_t some[MOST_ROWS];
      for (int i = 0; i < MOST_ROWS; ++i) {
        some[i] = row + i < rows ? row + i : rows - 1;
      }
      multiply_tile<BITS, GROUP, MOST_ROWS, MOST_VECTORS>(matrix, chunk, some, some_x, some_out);
    }
  }
}

template <int BITS>
void arrange(const Matrix& matrix, const float* x, float* arranged) {
  using Unit = Unit<BITS>;
  float quotient[Unit::weights];
  for (int k = 0; k < Unit::weights; ++k) {
    quotient[k] = 1.0f / Unit::divisor(k);
  }
  const int64_t units = matrix.columns / Unit::weights;
  for (int64_t block = 0; block * LANES < units; ++block) {
    for (int k = 0; k < Unit::weights; ++k) {
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t unit = block * LANES + lane;
        *arranged++ = unit < units ? x[unit * Unit::weights + k] * quotient[k] : 0.0f;
      }
    }
  }
  const int64_t groups = matrix.columns / matrix.group;
  for (int64_t g = 0; g < padded(groups, LANES); ++g) {
    double sum = 0;
    for (int64_t i = g * matrix.group; g < groups && i < (g + 1) * matrix.group; ++i) {
      sum += x[i];
    }
    *arranged++ = static_cast<float>(sum);
  }
}

template <typename Result, typename F>
INLINE Result with_bits(int bits, F&& function) {
  switch (bits) {
    case 2: return function.template operator()<2>();
    case 3: return function.template operator()<3>();
    case 4: return function.template operator()<4>();
    case 5: return function.template operator()<5>();
    case 6: return function.template operator()<6>();
    default: return function.template operator()<8>();
  }
}

Layout layout(const Matrix& matrix) {
  const int64_t groups = matrix.columns / matrix.group;
  const int64_t sums = with_bits<int64_t>(matrix.bits, [&]<int BITS>() { return sums_at<BITS>(matrix); });
  return {padded(sums + padded(groups, LANES), 16), 2 * padded(MOST_CHUNK * groups + 2 * LANES, LANES)};
}

void arrange_any(const Matrix& matrix, const float* x, float* arranged) {
  with_bits<void>(matrix.bits, [&]<int BITS>() { arrange<BITS>(matrix, x, arranged); });
}

void multiply_any(
    const Matrix& matrix,
    int64_t begin,
    int64_t end,
    const float* const* x,
    float* const* out,
    int64_t vectors,
    float* scratch) {
  with_bits<void>(matrix.bits, [&]<int BITS>() {
    auto with_group = [&]<int GROUP>() { multiply<BITS, GROUP>(matrix, begin, end, x, out, vectors, scratch); };
    switch (matrix.group) {
      case 32: return with_group.template operator()<32>();
      case 64: return with_group.template operator()<64>();
      default: return with_group.template operator()<128>();
    }
  });
}

void swiglu(float* out, const float* up, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Floats x = load(out + i);
    store(out + i, x * sigmoid(x) * load(up + i));
  });
}

}  // namespace
}  // namespace flashmoe
