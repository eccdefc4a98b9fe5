// What tokens attend to, of the parts that attend.metal made, times the sigmoid of the output's gate. A threadgroup takes
// one head of one token, and GROUPS of its threads four neighbouring elements: each of them takes every GROUPS-th part.
template <typename T, int DIM, int GROUPS, typename Weights, typename Shared>
inline void merge_attended(
    const device T* x,            // [tokens, width]: for each head its query, then the gate of its output
    const device float* sums,     // [tokens, heads, parts, DIM]
    Weights weights,              // [tokens, heads, parts, 2]: the best score of a part, and the sum of its weights
    device T* out,                // [tokens, heads, DIM]
    Shared shared,                // [GROUPS * (DIM + 1)], threadgroup memory
    int heads,
    int parts,
    int width,
    int head,
    int token,
    int thread_in_group,
    int lane) {
  constexpr int ACROSS = DIM / 4;
  const int first_element = thread_in_group % ACROSS * 4;
  const int group = thread_in_group / ACROSS;
  const size_t first = ((size_t)token * heads + head) * parts;
  float best = LOWEST;
  for (int part = lane; part < parts; part += 32) {
    best = max(best, weights[2 * (first + part)]);
  }
  best = max_lanes(best);
  float own[4] = {}, total = 0.0f;
#pragma unroll 4
  for (int part = group; part < parts; part += GROUPS) {
    uint words[4];
    load_words<4>((const device uint*)(sums + (first + part) * DIM + first_element), words);
    const float kept = exp2(weights[2 * (first + part)] - best);
    total = fma(kept, weights[2 * (first + part) + 1], total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own[i] = fma(kept, as_type<float>(words[i]), own[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    shared[group * DIM + first_element + i] = own[i];
  }
  shared[GROUPS * DIM + group] = total;  // all threads of a group write the same
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
