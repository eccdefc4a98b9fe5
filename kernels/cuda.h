// Metal's keywords and functions in CUDA, so that mx.fast.cuda_kernel compiles the .metal files unchanged. Threadgroups
// are one-dimensional and consist of whole simdgroups.

#define device
#define constant
#define thread
// CUDA defines this as a macro that contains the word `device`.
#undef __device__
#define inline __attribute__((__device__)) __forceinline__

using uint = unsigned int;
using float16_t = __half;
using bfloat16_t = __nv_bfloat16;
using half2 = __half2;

#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_simdgroup (threadIdx.x % 32)

template <typename To, typename From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

inline float simd_shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
