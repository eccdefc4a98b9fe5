// The RMS norm of a token whose elements are in the registers of a threadgroup: thread i has the runs i, i + THREADS,
// ... of 16 bytes each.
template <typename T, int HIDDEN, int SIMDGROUPS>
struct PerThread {
  static constant constexpr int RUN = 16 / sizeof(T);
  static constant constexpr int THREADS = 32 * SIMDGROUPS;
  static constant constexpr int RUNS = (HIDDEN + THREADS * RUN - 1) / (THREADS * RUN);
};

template <typename T, int HIDDEN, int SIMDGROUPS, typename Eps, typename Shared>
inline void write_norm(
    const thread float* values,  // [RUNS * RUN], zeros past the end
    const device T* weight,      // [HIDDEN]
    Eps eps,                     // [1]
    device T* normed,            // [HIDDEN]
    Shared partial,              // [SIMDGROUPS], threadgroup memory
    int simdgroup,
    int lane) {
  using Own = PerThread<T, HIDDEN, SIMDGROUPS>;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Own::RUNS * Own::RUN; ++i) {
    squares = fma(values[i], values[i], squares);
  }
  squares = sum_lanes<32>(squares);
  if (lane == 0) {
    partial[simdgroup] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float scale = rsqrt(sum_lanes<32>(lane < SIMDGROUPS ? partial[lane] : 0.0f) / HIDDEN + eps[0]);
#pragma unroll
  for (int run = 0; run < Own::RUNS; ++run) {
    const int at = (run * Own::THREADS + simdgroup * 32 + lane) * Own::RUN;
#pragma unroll
    for (int i = 0; i < Own::RUN; ++i) {
      if (at < HIDDEN) {
        normed[at + i] = T(values[run * Own::RUN + i] * scale * float(weight[at + i]));
      }
    }
  }
}
