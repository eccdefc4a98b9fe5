// Attention of a few tokens at the end of a sequence, over a part of its positions: what merge_attended.metal puts
// together. SHARE heads of queries have a head of keys and values in common.
//
// A simdgroup takes EACH heads of one token and one part. LANES of its lanes share a key, the others take the key next to
// it, so that it works on ACROSS keys, and it reads those of AT_ONCE steps before it uses them. Weights are
// 2^(score - best), where best is the largest score so far.

// Adds up what lanes hold that have the same elements of different keys.
template <int LANES>
inline float sum_across(float value) {
  for (int distance = 1; distance < 32 / LANES; distance *= 2) {
    value += simd_shuffle_xor(value, distance);
  }
  return value;
}

template <typename T, int DIM, int SHARE, int EACH, typename Position, typename Scale>
inline void attend(
    const device T* queries,  // [heads, tokens, DIM]
    const device T* keys,     // [key heads, capacity, DIM]
    const device T* values,   // likewise
    Position position,        // [1]: of the first token
    Scale scale,              // [1]: of the scores, times log2(e)
    device float* sums,       // [tokens, heads, parts, DIM]: of the values, times their weights
    device float* weights,    // [tokens, heads, parts, 2]: the best score, and the sum of the weights
    int tokens,
    int heads,
    int capacity,
    int parts,
    int key_head,
    int part,
    int token,
    int simdgroup,
    int lane) {
  constexpr int LANES = 16;
  constexpr int ACROSS = 32 / LANES;
  constexpr int AT_ONCE = 2;
  constexpr int OWN = DIM / LANES;  // elements of a head that a lane has
  constexpr int PER_WORD = 4 / sizeof(T);
  constexpr int WORDS = OWN / PER_WORD;
  const int first_head = key_head * SHARE + simdgroup * EACH;
  const int first_element = lane / ACROSS * OWN;
  const int count = position[0] + token + 1;
  const int length = (count + parts - 1) / parts;
  const int begin = part * length;
  const int end = min(begin + length, count);

  float q[EACH][OWN], sum[EACH][OWN], best[EACH], total[EACH];
#pragma unroll
  for (int h = 0; h < EACH; ++h) {
    best[h] = LOWEST;
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
      float better = best[h];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        better = first + n * ACROSS < end ? max(better, weight[n][h]) : better;
      }
      const float kept = exp2(best[h] - better);
      best[h] = better;
      total[h] *= kept;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        sum[h][i] *= kept;
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        weight[n][h] = first + n * ACROSS < end ? exp2(weight[n][h] - better) : 0.0f;
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
    const size_t at = ((size_t)token * heads + first_head + h) * parts + part;
    float better = best[h];
    for (int distance = 1; distance < ACROSS; distance *= 2) {
      better = max(better, simd_shuffle_xor(better, distance));
    }
    const float kept = exp2(best[h] - better);
    const float weight = sum_across<LANES>(total[h] * kept);
    if (lane == 0) {
      weights[2 * at] = better;
      weights[2 * at + 1] = weight;
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float weighted = sum_across<LANES>(sum[h][i] * kept);
      if (lane % ACROSS == 0) {
        sums[at * DIM + first_element + i] = weighted;
      }
    }
  }
}
