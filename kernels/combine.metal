// out = x + sum over experts of score * y + the shared expert's score * shared, and the RMS norm of it, which the next
// layer begins with. A threadgroup takes one token.
template <typename T, int HIDDEN, int TOP_K, int SIMDGROUPS, typename Scores, typename Eps, typename Shared>
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
  constexpr int THREADS = 32 * SIMDGROUPS;
  constexpr int PER_THREAD = (HIDDEN + THREADS - 1) / THREADS;
  const size_t start = (size_t)token * HIDDEN;
  float values[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + simdgroup * 32 + lane;
    values[i] = 0.0f;
    if (at < HIDDEN) {
      float sum = float(scores[token * (TOP_K + 1) + TOP_K]) * float(shared[start + at]);
#pragma unroll
      for (int k = 0; k < TOP_K; ++k) {
        sum = fma(float(scores[token * (TOP_K + 1) + k]), float(y[start * TOP_K + k * HIDDEN + at]), sum);
      }
      const T rounded = T(float(x[start + at]) + sum);
      out[start + at] = rounded;
      values[i] = float(rounded);
    }
  }
  write_norm<T, HIDDEN, SIMDGROUPS>(values, weight, eps, normed + start, partial, simdgroup, lane);
}
