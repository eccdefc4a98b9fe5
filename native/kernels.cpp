// Products of quantised matrices with float32 vectors, and the step of a linear attention.
//
// Compiled once for each instruction set, with LANES (floats in a register) and KERNELS (the function that hands them
// out). Nothing here may call a template of the standard library: the linker would keep one copy for all sets.
//
// A row's product is sum over groups of scale * sum(q * x) + bias * sum(x). A block is a register of units, one in each
// lane; a unit is the least whole number of words that holds whole weights. So weight k of all units of a block is a
// register after one AND and one conversion: it is not even shifted to the right, because x has been divided by that
// power of two before. Vectors are arranged accordingly, once for all rows.

#include "kernels.h"

#include <utility>

namespace flashmoe {
namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int MOST_ROWS = LANES == 16 ? 4 : 2;  // of a tile: what the registers hold
constexpr int MOST_VECTORS = 4;
constexpr int AHEAD = 512;                      // words of a row that are asked of memory before their turn

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

INLINE int64_t padded(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
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

typedef double Doubles __attribute__((vector_size(8 * LANES)));

INLINE double sum_of_squares(const float* x, int64_t size) {
  Doubles squares = {};
  for_each(size, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
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
    for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
      store(sum + i, load(x + i) + load(y + i));
    });
    x = sum;
  }
  const float factor = rms_factor(x, size, eps);
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    store(normed + i, load(x + i) * factor * load(weight + i));
  });
}

void combine(
    const float* x,
    const float* y,
    const float* scores,
    int64_t count,
    const float* shared,
    int64_t size,
    float* out) {
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    Floats total = {};
    for (int64_t k = 0; k < count; ++k) {
      total += load(y + k * size + i) * scores[k];
    }
    store(out + i, load(x + i) + (total + load(shared + i) * scores[count]));
  });
}

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

void gate(float* x, const float* gate, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    store(x + i, load(x + i) * sigmoid(load(gate + i)));
  });
}

void swiglu(float* out, const float* up, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Floats x = load(out + i);
    store(out + i, x * sigmoid(x) * load(up + i));
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

constexpr Kernels KERNELS_OF_THIS_SET = {
    SET_NAME, layout,   arrange_any, multiply_any, norm, combine,    soften,
    convolve, normalize, gated_norm,  gate,         swiglu, delta_step, attend};

}  // namespace

const Kernels* KERNELS() {
  return &KERNELS_OF_THIS_SET;
}

}  // namespace flashmoe
