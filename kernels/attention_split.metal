// Flash-decoding: attention of a decode step over one split of the KV cache, with an online softmax.
// attention_merge.metal combines the splits. SHARE query heads share a key head.
//
// A simdgroup computes EACH query heads of one token. LANES lanes share a key, each with OWN of its elements, and
// neighboring lanes have the next key, so that a step takes ACROSS keys. The loads of AT_ONCE steps are issued before
// the first is used. Softmax weights are 2^(score - max_score), with the largest score so far.

// Sums over the lanes that have the same elements of different keys.
template <int LANES>
inline float sum_across(float value) {
  for (int distance = 1; distance < 32 / LANES; distance *= 2) {
    value += simd_shuffle_xor(value, distance);
  }
  return value;
}

template <typename T, int DIM, int SHARE, int EACH, int LANES, typename Position, typename Scale>
inline void attention_split(
    const device T* queries,  // [heads, tokens, DIM]
    const device T* keys,     // [key heads, capacity, DIM]
    const device T* values,   // [key heads, capacity, DIM]
    Position position,        // [1]: of the first token
    Scale scale,              // [1]: of the scores, times log2(e)
    device float* sums,       // [tokens, heads, splits, DIM]: weighted sums of values
    device float* weights,    // [tokens, heads, splits, 2]: the largest score, and the sum of weights
    int tokens,
    int heads,
    int capacity,
    int splits,
    int key_head,
    int split,
    int token,
    int simdgroup,
    int lane) {
  constexpr int ACROSS = 32 / LANES;
  constexpr int AT_ONCE = 2;
  constexpr int OWN = DIM / LANES;
  constexpr int PER_WORD = 4 / sizeof(T);
  constexpr int WORDS = OWN / PER_WORD;
  const int first_head = key_head * SHARE + simdgroup * EACH;
  const int first_element = lane / ACROSS * OWN;
  const int count = position[0] + token + 1;
  const int length = (count + splits - 1) / splits;
  const int begin = split * length;
  const int end = min(begin + length, count);

  float q[EACH][OWN], sum[EACH][OWN], max_score[EACH], total[EACH];
#pragma unroll
  for (int h = 0; h < EACH; ++h) {
    max_score[h] = LOWEST;
    total[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      q[h][i] = scale[0] * float(queries[((size_t)(first_head + h) * tokens + token) * DIM + first_element + i]);
      sum[h][i] = 0.0f;
    }
  }

  for (int first = begin + lane % ACROSS; first - lane % ACROSS < end; first += ACROSS * AT_ONCE) {
    uint key[AT_ONCE][WORDS], value[AT_ONCE][WORDS];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const size_t at = ((size_t)key_head * capacity + min(first + n * ACROSS, end - 1)) * DIM + first_element;
      load_words<WORDS>((const device uint*)(keys + at), key[n]);
      load_words<WORDS>((const device uint*)(values + at), value[n]);
    }
    float weight[AT_ONCE][EACH];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      float k[OWN];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        unpack(key[n][i], k + i * PER_WORD, T(0.0f));
      }
#pragma unroll
      for (int h = 0; h < EACH; ++h) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          score = fma(q[h][i], k[i], score);
        }
        weight[n][h] = sum_lanes<LANES>(score);
      }
    }
#pragma unroll
    for (int h = 0; h < EACH; ++h) {
      float new_max = max_score[h];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        new_max = first + n * ACROSS < end ? max(new_max, weight[n][h]) : new_max;
      }
      const float rescale = exp2(max_score[h] - new_max);
      max_score[h] = new_max;
      total[h] *= rescale;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        sum[h][i] *= rescale;
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        weight[n][h] = first + n * ACROSS < end ? exp2(weight[n][h] - new_max) : 0.0f;
        total[h] += weight[n][h];
      }
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      float v[OWN];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        unpack(value[n][i], v + i * PER_WORD, T(0.0f));
      }
#pragma unroll
      for (int h = 0; h < EACH; ++h) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          sum[h][i] = fma(weight[n][h], v[i], sum[h][i]);
        }
      }
    }
  }

#pragma unroll
  for (int h = 0; h < EACH; ++h) {
    const size_t at = ((size_t)token * heads + first_head + h) * splits + split;
    float new_max = max_score[h];
    for (int distance = 1; distance < ACROSS; distance *= 2) {
      new_max = max(new_max, simd_shuffle_xor(new_max, distance));
    }
    const float rescale = exp2(max_score[h] - new_max);
    const float weight = sum_across<LANES>(total[h] * rescale);
    if (lane == 0) {
      weights[2 * at] = new_max;
      weights[2 * at + 1] = weight;
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float weighted = sum_across<LANES>(sum[h][i] * rescale);
      if (lane % ACROSS == 0) {
        sums[at * DIM + first_element + i] = weighted;
      }
    }
  }
}
