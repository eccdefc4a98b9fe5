// Products of quantized matrices with float32 vectors.
//
// A row's product is the sum over its groups of scale * sum(q * x) + bias * sum(x). Vectors are packed once for all
// rows: permuted into the order in which weights are unpacked, with the sums of their groups behind them.
#pragma once

#include "kernels.h"
#include "loops/quantized.h"
#include "loops/vectors.h"

namespace flashmoe {
namespace {

// A tile is as many rows and vectors as fit into registers.
constexpr int TILE_ROWS = LANES == 16 ? 4 : 2;
constexpr int TILE_VECTORS = 4;

// Words of a row between a weight that is used and the one that is prefetched.
constexpr int PREFETCH_DISTANCE = 512;

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

// Where the group sums of a packed vector begin.
template <int BITS>
INLINE int64_t sums_offset(const Matrix& matrix) {
  return round_up(matrix.columns, Unit<BITS>::block_weights);
}

// Consecutive rows of a matrix, with their scales and biases in float32.
struct Chunk {
  const uint32_t* weight;
  const float* scales;
  const float* biases;
};

// Multiply some rows of a chunk with some vectors: out[t][rows[i]] = chunk[rows[i]] vectors[t].
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
  constexpr int lanes_per_group = GROUP / Unit::weights;
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
    // The last register may hold biases of the next row; the group sums that they meet are padded with zeros.
    for (int64_t g = 0; g < groups; g += LANES) {
      Floats bias = load<Floats>(chunk.biases + rows[row] * groups + g);
      for (int t = 0; t < VECTORS; ++t) {
        total[row][t] += bias * load<Floats>(x[t] + sums_offset<BITS>(matrix) + g);
      }
    }
  }
  auto add = [&](int64_t block) ALWAYS_INLINE {
    Floats dot[ROWS][VECTORS];
    add_block<BITS, ROWS, VECTORS>(weight, x, dot, each_weight);
    for (int row = 0; row < ROWS; ++row) {
      Floats scale = spread<lanes_per_group>(scales[row] + block * LANES / lanes_per_group, each_lane);
      for (int t = 0; t < VECTORS; ++t) {
        total[row][t] = scale * dot[row][t] + total[row][t];
      }
    }
  };
  for (int64_t block = 0; block < blocks; ++block) {
    add(block);
    for (int row = 0; row < ROWS; ++row) {
      weight[row] += LANES * Unit::words;
      __builtin_prefetch(weight[row] + PREFETCH_DISTANCE);
    }
    for (int t = 0; t < VECTORS; ++t) {
      x[t] += Unit::block_weights;
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
void multiply_chunk(
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
  float* const biases = scratch + round_up(rows * groups + 2 * LANES, LANES);
  const int64_t words = matrix.columns * BITS / 32;
  const int64_t part = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const Chunk chunk = {matrix.weight + begin * words, scales, biases};
  // Prefetch the start of each part while scales are converted.
  for (int64_t i = 0; i < PREFETCH_DISTANCE; i += 16) {
    for (int64_t row = 0; row < rows; row += part) {
      __builtin_prefetch(chunk.weight + row * words + i);
    }
  }
  widen(matrix.scales, matrix.stored, begin * groups, rows * groups, scales);
  widen(matrix.biases, matrix.stored, begin * groups, rows * groups, biases);

  // A tile that lacks rows or vectors repeats the last ones, and writes the same results again.
  for (int64_t t = 0; t < vectors; t += TILE_VECTORS) {
    if (t + 1 == vectors) {
      // One vector is bound by memory bandwidth: a tile has one row of each part, so that weights are read in a few
      // long sequential streams. Its accumulators are independent.
      for (int64_t row = 0; row < part; ++row) {
        int64_t tile_rows[TILE_ROWS];
        for (int i = 0; i < TILE_ROWS; ++i) {
          tile_rows[i] = row + i * part < rows ? row + i * part : rows - 1;
        }
        multiply_tile<BITS, GROUP, TILE_ROWS, 1>(matrix, chunk, tile_rows, x + t, out + t);
      }
      return;
    }
    // More vectors: a few of them with all rows, so that they stay in the L1 cache.
    const float* tile_x[TILE_VECTORS];
    float* tile_out[TILE_VECTORS];
    for (int i = 0; i < TILE_VECTORS; ++i) {
      const int64_t vector = t + i < vectors ? t + i : vectors - 1;
      tile_x[i] = x[vector];
      tile_out[i] = out[vector];
    }
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      int64_t tile_rows[TILE_ROWS];
      for (int i = 0; i < TILE_ROWS; ++i) {
        tile_rows[i] = row + i < rows ? row + i : rows - 1;
      }
      multiply_tile<BITS, GROUP, TILE_ROWS, TILE_VECTORS>(matrix, chunk, tile_rows, tile_x, tile_out);
    }
  }
}

template <int BITS>
void pack(const Matrix& matrix, const float* x, float* packed) {
  using Unit = Unit<BITS>;
  float quotient[Unit::weights];
  for (int k = 0; k < Unit::weights; ++k) {
    quotient[k] = 1.0f / Unit::factor(k);
  }
  const int64_t units = matrix.columns / Unit::weights;
  for (int64_t block = 0; block * LANES < units; ++block) {
    for (int k = 0; k < Unit::weights; ++k) {
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t unit = block * LANES + lane;
        *packed++ = unit < units ? x[unit * Unit::weights + k] * quotient[k] : 0.0f;
      }
    }
  }
  const int64_t groups = matrix.columns / matrix.group;
  for (int64_t g = 0; g < round_up(groups, LANES); ++g) {
    double sum = 0;
    for (int64_t i = g * matrix.group; g < groups && i < (g + 1) * matrix.group; ++i) {
      sum += x[i];
    }
    *packed++ = static_cast<float>(sum);
  }
}

// Call function<BITS>().
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

BufferSizes buffer_sizes(const Matrix& matrix) {
  const int64_t groups = matrix.columns / matrix.group;
  const int64_t sums = with_bits<int64_t>(matrix.bits, [&]<int BITS>() { return sums_offset<BITS>(matrix); });
  return {round_up(sums + round_up(groups, LANES), 16), 2 * round_up(MAX_CHUNK_ROWS * groups + 2 * LANES, LANES)};
}

void pack_vector(const Matrix& matrix, const float* x, float* packed) {
  with_bits<void>(matrix.bits, [&]<int BITS>() { pack<BITS>(matrix, x, packed); });
}

void multiply(
    const Matrix& matrix,
    int64_t begin,
    int64_t end,
    const float* const* x,
    float* const* out,
    int64_t vectors,
    float* scratch) {
  with_bits<void>(matrix.bits, [&]<int BITS>() {
    auto with_group = [&]<int GROUP>() { multiply_chunk<BITS, GROUP>(matrix, begin, end, x, out, vectors, scratch); };
    switch (matrix.group) {
      case 32: return with_group.template operator()<32>();
      case 64: return with_group.template operator()<64>();
      default: return with_group.template operator()<128>();
    }
  });
}

void swiglu(float* out, const float* up, int64_t size) {
  for_each(size, [&](int64_t i, auto load, auto store) ALWAYS_INLINE {
    const Floats x = load(out + i);
    store(out + i, x * sigmoid(x) * load(up + i));
  });
}

}  // namespace
}  // namespace flashmoe
