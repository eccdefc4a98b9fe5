// A residual connection, sum = x + y, and its RMS norm. A threadgroup computes one token.
template <typename T, int HIDDEN, int SIMDGROUPS, typename Eps, typename Shared>
inline void add_norm(
    const device T* x,       // [tokens, HIDDEN]
    const device T* y,       // [tokens, HIDDEN]
    const device T* weight,  // [HIDDEN]
    Eps eps,                 // [1]
    device T* sum,           // [tokens, HIDDEN]
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
      float other[Own::RUN];
      load_chunk(x + start + at, own);
      load_chunk(y + start + at, other);
#pragma unroll
      for (int i = 0; i < Own::RUN; ++i) {
        const T rounded = T(own[i] + other[i]);
        sum[start + at + i] = rounded;
        own[i] = float(rounded);
      }
    }
  }
  write_norm<T, HIDDEN, SIMDGROUPS>(values, weight, eps, normed + start, partial, simdgroup, lane);
}
