// Products with weights in MLX's affine quantization: a weight is scale * q + bias, where q has BITS bits, and GROUP
// weights of a row share scale and bias. Included before each kernel.
//
// A row is processed in blocks of 32 weights. A block is BITS whole words, and lies in one group. A lane multiplies a
// block with its activations by one FMA per weight:
//
//     sum (scale * q + bias) * x  =  scale * sum q * x  +  bias * sum x
//
// At 2, 4 and 8 bits a byte holds whole weights. They are not shifted down but used in place, as q * 2^shift, and the
// activation is multiplied by 2^-shift in advance, once for all rows. Both are exact, and a GPU converts a byte of a
// word to float in one instruction.
//
// LANES lanes of a simdgroup share a row and take its blocks in turn, so that a simdgroup computes 32 / LANES rows at a
// time. Lane l has row l % (32 / LANES), so that neighboring lanes load the same activations.

// Weights of a block.
constant constexpr int BLOCK = 32;

// The slot of an expert that is not in memory: its products are zero.
constant constexpr uint NO_SLOT = 0xffffffff;

// The bit at which weight `i` of a block is used in its byte.
template <int BITS>
inline constexpr int shift_in_byte(int i) {
  return 8 % BITS == 0 ? i * BITS % 8 : 0;
}

// Loads words, by the widest loads that divide their number.
template <int COUNT>
inline void load_words(const device uint* from, thread uint* words) {
  if (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const uint4 four = *(const device uint4*)(from + i);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  } else if (COUNT % 2 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const uint2 two = *(const device uint2*)(from + i);
      words[i] = two.x;
      words[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      words[i] = from[i];
    }
  }
}

// The activations in a word. The last argument selects their type.
inline void unpack(uint word, thread float* x, float) {
  x[0] = as_type<float>(word);
}

inline void unpack(uint word, thread float* x, float16_t) {
  const half2 two = as_type<half2>(word);
  x[0] = float(two.x);
  x[1] = float(two.y);
}

inline void unpack(uint word, thread float* x, bfloat16_t) {
  x[0] = as_type<float>(word << 16);
  x[1] = as_type<float>(word & 0xffff0000u);
}

// Loads 16 bytes of activations.
template <typename T>
inline void load_chunk(const device T* from, thread float* values) {
  constexpr int PER_WORD = 4 / sizeof(T);
  uint words[4];
  load_words<4>((const device uint*)from, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unpack(words[i], values + i * PER_WORD, T(0.0f));
  }
}

// Loads the activations of a block into `x`, each multiplied by 2^-shift. Returns the sum of the activations
// themselves.
template <typename T, int BITS>
inline float load_activations(const device T* from, thread float* x) {
  constexpr int PER_WORD = 4 / sizeof(T);
  constexpr int WORDS = BLOCK / PER_WORD;
  uint words[WORDS];
  load_words<WORDS>((const device uint*)from, words);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    unpack(words[i], x + i * PER_WORD, T(0.0f));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) {
    sum += x[i];
    x[i] *= as_type<float>(uint(127 - shift_in_byte<BITS>(i)) << 23);
  }
  return sum;
}

// The product of block number `block` of the array and the results of load_activations().
template <typename T, int BITS, int GROUP>
inline float dot_block(
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    size_t block,
    const thread float* x,
    float sum) {
  constexpr uint MASK = (1u << BITS) - 1;
  uint words[BITS];
  load_words<BITS>(weight + block * BITS, words);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) {
    const int word = i * BITS / 32;
    const int shift = i * BITS % 32;
    uint q = words[word];
    if (8 % BITS == 0) {
      q = (q & (MASK << shift % 8) * 0x01010101u) >> shift / 8 * 8 & 0xff;
    } else {
      q >>= shift;
      if (shift + BITS > 32) {
        q |= words[word + 1] << (32 - shift);
      }
      q &= MASK;
    }
    dot = fma(float(q), x[i], dot);
  }
  const size_t group = block * BLOCK / GROUP;
  return fma(float(scales[group]), dot, float(biases[group]) * sum);
}

// The sum over the lanes of a row.
template <int LANES>
inline float sum_lanes(float value) {
  for (int distance = 16; distance >= 32 / LANES; distance /= 2) {
    value += simd_shuffle_xor(value, distance);
  }
  return value;
}

// Less than any score or logit.
constant constexpr float LOWEST = -3.4e38f;

// The maximum over all lanes.
inline float max_lanes(float value) {
  for (int distance = 16; distance >= 1; distance /= 2) {
    value = max(value, simd_shuffle_xor(value, distance));
  }
  return value;
}

// Products of `x` with rows first_row + r * (32 / LANES) of an expert, for r < ROWS. Rows past the end repeat the last
// one.
template <typename T, int BITS, int GROUP, int ROWS, int LANES>
inline void dot_rows(
    const device T* x,
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    size_t slot,
    int columns,
    int rows,
    int first_row,
    int lane,
    thread float* dots) {
  constexpr int ROWS_ACROSS = 32 / LANES;
  // Blocks whose loads are in flight.
  constexpr int UNROLL = 2;
  const int blocks = slot == NO_SLOT ? 0 : columns / BLOCK;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    dots[r] = 0.0f;
  }
#pragma unroll UNROLL
  for (int block = lane / ROWS_ACROSS; block < blocks; block += LANES) {
    float activations[BLOCK];
    const float sum = load_activations<T, BITS>(x + block * BLOCK, activations);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = min(first_row + r * ROWS_ACROSS, rows - 1);
      const size_t at = (slot * rows + row) * blocks + block;
      dots[r] += dot_block<T, BITS, GROUP>(weight, scales, biases, at, activations, sum);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    dots[r] = sum_lanes<LANES>(dots[r]);
  }
}
