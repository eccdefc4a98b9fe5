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
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + simdgroup * 32 + lane;
    values[i] = 0.0f;
    if (at < HIDDEN) {
      const T rounded = T(float(x[start + at]) + float(y[start + at]));
      sum[start + at] = rounded;
      values[i] = float(rounded);
      squares = fma(values[i], values[i], squares);
    }
  }
  squares = sum_lanes<32>(squares);
  if (lane == 0) {
    partial[simdgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float scale = rsqrt(sum_lanes<32>(lane < SIMDGROUPS ? partial[lane] : 0.0f) / HIDDEN + eps[0]);
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = i * THREADS + simdgroup * 32 + lane;
    if (at < HIDDEN) {
      normed[start + at] = T(values[i] * scale * float(weight[at]));
    }
  }
}
