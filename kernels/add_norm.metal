// sum = x + y, and the RMS norm of the sum. A threadgroup takes one token.
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
  constexpr int THREADS = 32 * SIMDGROUPS;
  constexpr int PER_THREAD = (HIDDEN + THREADS - 1) / THREADS;
  const size_t start = (size_t)token * HIDDEN;
  float values[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + simdgroup * 32 + lane;
    values[i] = 0.0f;
    if (at < HIDDEN) {
      const T rounded = T(float(x[start + at]) + float(y[start + at]));
      sum[start + at] = rounded;
      values[i] = float(rounded);
    }
  }
  write_norm<T, HIDDEN, SIMDGROUPS>(values, weight, eps, normed + start, partial, simdgroup, lane);
}
