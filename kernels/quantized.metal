// Rows of weights as MLX's affine mode stores them: a weight is scale * q + bias, where q has BITS bits and every
// GROUP weights of a row share scale and bias. Included before each kernel.
//
// A row is read in blocks of 32 weights. Whatever BITS is, a block is BITS whole words and lies in one group. A lane
// multiplies a block with its activations using one fused multiply-add a weight:
//
//     sum (scale * q + bias) * x  =  scale * sum q * x  +  bias * sum x
//
// Of 2, 4 or 8 bits, several q lie in a byte. One is used where it lies, as q * 2^shift, and the activation is
// multiplied by 2^-shift beforehand, once for all rows: both are exact, and a GPU converts a byte of a word to float
// in one instruction.
//
// LANES lanes of a simdgroup share a row and take its blocks in turn, so that a simdgroup works on 32 / LANES rows.
// Lane l works on row l % (32 / LANES): neighbours then read the same activations.

constant constexpr int BLOCK = 32;  // weights

constant constexpr uint NO_SLOT = 0xffffffff;  // of an expert that is not in memory: products with it are zero

// Where weight `i` of a block is used in its byte.
template <int BITS>
inline constexpr int shift_in_byte(int i) {
  return 8 % BITS == 0 ? i * BITS % 8 : 0;
}

// Reads words, as many at once as their number allows.
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

// The activations in a word. The last argument only says of which type they are.
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

// Reads 16 bytes.
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

// Reads the activations of a block into `x`, each times 2^-shift. Returns the sum of what was read.
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

// The product of a block of weights, counted from the start of the array, and what load_activations() left.
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

// Adds up what the lanes of a row hold.
template <int LANES>
inline float sum_lanes(float value) {
  for (int distance = 16; distance >= 32 / LANES; distance /= 2) {
    value += simd_shuffle_xor(value, distance);
  }
  return value;
}

constant constexpr float LOWEST = -3.4e38f;

// The largest of what all lanes hold.
inline float max_lanes(float value) {
  for (int distance = 16; distance >= 1; distance /= 2) {
    value = max(value, simd_shuffle_xor(value, distance));
  }
  return value;
}

// Rows first_row + r * (32 / LANES) of an expert, for r < ROWS, times `x`. Rows past the end repeat the last one.
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
  constexpr int UNROLL = 2;  // reads on their way
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
