// The words of the Metal Shading Language that the kernels use, for clang's C++ for OpenCL 2021. Its address spaces are
// as disjoint as Metal's. A kernel with a word that is missing here does not compile.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef ulong size_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;

typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
typedef half half2 __attribute__((ext_vector_type(2)));

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, from);
}

namespace metal {

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp(float x) { return __builtin_amdgcn_exp2f(x * 1.44269504f); }
inline float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
inline float log(float x) { return __builtin_amdgcn_logf(x) * 0.69314718f; }
inline float rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }
inline float sin(float x) { return __builtin_amdgcn_sinf(x); }
inline float cos(float x) { return __builtin_amdgcn_cosf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }

// An overload for each type and no template: calls with mixed types are ambiguous, as in Metal.
#define MIN_AND_MAX(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }      \
  inline T max(T a, T b) { return a < b ? b : a; }
MIN_AND_MAX(short)
MIN_AND_MAX(ushort)
MIN_AND_MAX(int)
MIN_AND_MAX(uint)
MIN_AND_MAX(long)
MIN_AND_MAX(ulong)
MIN_AND_MAX(half)
MIN_AND_MAX(float)
#undef MIN_AND_MAX

inline uint lane_of_thread() { return __builtin_amdgcn_mbcnt_lo(~0u, 0); }

template <typename T>
inline T simd_shuffle_xor(T value, ushort mask) {
  static_assert(sizeof(T) == 4, "shuffles are of 32 bits");
  const int from = (lane_of_thread() ^ mask) * 4;
  return as_type<T>(__builtin_amdgcn_ds_bpermute(from, as_type<int>(value)));
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

inline void threadgroup_barrier(mem_flags) {
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "workgroup");
  __builtin_amdgcn_s_barrier();
}

}  // namespace metal
using namespace metal;

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define double double_is_no_type_of_Metal
// Metal inlines every function; without it registers of a call would not be counted.
#define inline __attribute__((always_inline)) inline
