// Combines the splits that attention_split.metal wrote, and multiplies by the sigmoid of the output's gate.
//
// A threadgroup computes one head of one token. Four neighboring elements are shared by GROUPS of its threads, each of
// which takes every GROUPS-th split.
template <typename T, int DIM, int GROUPS, typename Weights, typename Shared>
inline void attention_merge(
    const device T* x,            // [tokens, width]: for each head its query, then the gate of its output
    const device float* sums,     // [tokens, heads, splits, DIM]
    Weights weights,              // [tokens, heads, splits, 2]: the largest score of a split, the sum of its weights
    device T* out,                // [tokens, heads, DIM]
    Shared shared,                // [GROUPS * (DIM + 1)], threadgroup memory
    int heads,
    int splits,
    int width,
    int head,
    int token,
    int thread_in_group,
    int lane) {
  constexpr int ACROSS = DIM / 4;
  const int first_element = thread_in_group % ACROSS * 4;
  const int group = thread_in_group / ACROSS;
  const size_t first = ((size_t)token * heads + head) * splits;
  float max_score = LOWEST;
  for (int split = lane; split < splits; split += 32) {
    max_score = max(max_score, weights[2 * (first + split)]);
  }
  max_score = max_lanes(max_score);
  float own[4] = {}, total = 0.0f;
#pragma unroll 4
  for (int split = group; split < splits; split += GROUPS) {
    uint words[4];
    load_words<4>((const device uint*)(sums + (first + split) * DIM + first_element), words);
    const float rescale = exp2(weights[2 * (first + split)] - max_score);
    total = fma(rescale, weights[2 * (first + split) + 1], total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own[i] = fma(rescale, as_type<float>(words[i]), own[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    shared[group * DIM + first_element + i] = own[i];
  }
  // All threads of a group write the same value.
  shared[GROUPS * DIM + group] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int element = thread_in_group;
  if (element < DIM) {
    float sum = 0.0f;
    total = 0.0f;
#pragma unroll
    for (int other = 0; other < GROUPS; ++other) {
      sum += shared[other * DIM + element];
      total += shared[GROUPS * DIM + other];
    }
    const float gate = float(x[(size_t)token * width + (2 * head + 1) * DIM + element]);
    out[((size_t)token * heads + head) * DIM + element] = T(sum / total / (1.0f + exp(-gate)));
  }
}
