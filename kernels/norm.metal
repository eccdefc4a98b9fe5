// The RMS norm of a token whose elements the threads of a threadgroup hold: thread i those at i, i + THREADS, ...
template <typename T, int HIDDEN, int SIMDGROUPS, typename Eps, typename Shared>
inline void write_norm(
    const thread float* values,  // zero where there is no element
    const device T* weight,      // [HIDDEN]
    Eps eps,                     // [1]
    device T* normed,            // [HIDDEN]
    Shared partial,              // [SIMDGROUPS], threadgroup memory
    int simdgroup,
    int lane) {
  constexpr int THREADS = 32 * SIMDGROUPS;
  constexpr int PER_THREAD = (HIDDEN + THREADS - 1) / THREADS;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    squares = fma(values[i], values[i], squares);
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
      normed[at] = T(values[i] * scale * float(weight[at]));
    }
  }
}
