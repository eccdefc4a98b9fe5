// What tokens attend to, of the parts that attend.metal made, times the sigmoid of the output's gate. A threadgroup takes
// one head of one token, and GROUPS of its threads an element: each of them takes every GROUPS-th part.
template <typename T, int DIM, int GROUPS, typename Weights, typename Shared>
inline void merge_attended(
    const device T* x,            // [tokens, width]: for each head its query, then the gate of its output
    const device float* sums,     // [tokens, heads, parts, DIM]
    Weights weights,              // [tokens, heads, parts, 2]: the best score of a part, and the sum of its weights
    device T* out,                // [tokens, heads, DIM]
    Shared shared,                // [2 * GROUPS * DIM], threadgroup memory
    int heads,
    int parts,
    int width,
    int head,
    int token,
    int thread_in_group,
    int lane) {
  const int element = thread_in_group % DIM;
  const int group = thread_in_group / DIM;
  const size_t first = ((size_t)token * heads + head) * parts;
  float best = LOWEST;
  for (int part = lane; part < parts; part += 32) {
    best = max(best, weights[2 * (first + part)]);
  }
  best = max_lanes(best);
  float sum = 0.0f, total = 0.0f;
#pragma unroll 4
  for (int part = group; part < parts; part += GROUPS) {
    const float kept = exp2(weights[2 * (first + part)] - best);
    total = fma(kept, weights[2 * (first + part) + 1], total);
    sum = fma(kept, sums[(first + part) * DIM + element], sum);
  }
  shared[2 * thread_in_group] = sum;
  shared[2 * thread_in_group + 1] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (group == 0) {
#pragma unroll
    for (int other = 1; other < GROUPS; ++other) {
      sum += shared[2 * (other * DIM + element)];
      total += shared[2 * (other * DIM + element) + 1];
    }
    const float gate = float(x[(size_t)token * width + (2 * head + 1) * DIM + element]);
    out[((size_t)token * heads + head) * DIM + element] = T(sum / total / (1.0f + exp(-gate)));
  }
}
