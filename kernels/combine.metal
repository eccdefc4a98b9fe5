// The end of a layer of experts, out = x + sum over experts of score * y + shared score * shared, and its RMS norm,
// with which the next layer begins. A threadgroup computes one token. The loads of AT_ONCE experts, a divisor of TOP_K,
// are issued before the first is used.
template <
    typename T,
    int HIDDEN,
    int TOP_K,
    int AT_ONCE,
    int SIMDGROUPS,
    typename Scores,
    typename Eps,
    typename Shared>
inline void combine(
    const device T* x,       // [tokens, HIDDEN]
    const device T* y,       // [tokens, TOP_K, HIDDEN]
    Scores scores,           // [tokens, TOP_K + 1], in device or constant memory
    const device T* shared,  // [tokens, HIDDEN]
    const device T* weight,  // [HIDDEN]
    Eps eps,                 // [1]
    device T* out,           // [tokens, HIDDEN]
    device T* normed,        // [tokens, HIDDEN]
    Shared partial,          // [SIMDGROUPS], threadgroup memory
    int token,
    int simdgroup,
    int lane) {
  using Own = PerThread<T, HIDDEN, SIMDGROUPS>;
  const size_t start = (size_t)token * HIDDEN;
  float values[Own::RUNS * Own::RUN] = {};
#pragma unroll
  for (int run = 0; run < Own::RUNS; ++run) {
    const int at = (run * Own::THREADS + simdgroup * 32 + lane) * Own::RUN;
    if (at < HIDDEN) {
      thread float* own = values + run * Own::RUN;
      float residual[Own::RUN], shared_expert[Own::RUN];
      load_chunk(x + start + at, residual);
      load_chunk(shared + start + at, shared_expert);
      const float shared_score = float(scores[token * (TOP_K + 1) + TOP_K]);
#pragma unroll
      for (int i = 0; i < Own::RUN; ++i) {
        own[i] = shared_score * shared_expert[i];
      }
#pragma unroll 1
      for (int first = 0; first < TOP_K; first += AT_ONCE) {
        float routed[AT_ONCE][Own::RUN];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          load_chunk(y + start * TOP_K + (first + k) * HIDDEN + at, routed[k]);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          const float score = float(scores[token * (TOP_K + 1) + first + k]);
#pragma unroll
          for (int i = 0; i < Own::RUN; ++i) {
            own[i] = fma(score, routed[k][i], own[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Own::RUN; ++i) {
        const T rounded = T(residual[i] + own[i]);
        out[start + at + i] = rounded;
        own[i] = float(rounded);
      }
    }
  }
  write_norm<T, HIDDEN, SIMDGROUPS>(values, weight, eps, normed + start, partial, simdgroup, lane);
}
