// The words of the Metal Shading Language that kernels here use, for a C++17 compiler: types, then functions of one
// thread, then those of a simdgroup or threadgroup. A kernel with a word that is missing does not compile.

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#define INFINITY __builtin_inff()  // <cmath> takes longer to compile than all the rest: builtins do

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// As in Metal, a bfloat becomes a float by itself, and a float becomes a bfloat only by a cast.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <typename T, typename = std::enable_if_t<std::is_convertible_v<T, float>>>
  explicit bfloat(T value) {
    uint wide = as_type<uint>(float(value));
    wide += 0x7fff + (wide >> 16 & 1);  // to nearest, ties to even
    bits = float(value) != float(value) ? 0x7fc0 : wide >> 16;
  }
  operator float() const { return as_type<float>(uint(bits) << 16); }
  bfloat operator-() const { return bfloat(-float(*this)); }
};

#define EMULATOR_OPERATOR(op)                                                                     \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }          \
  template <typename T>                                                                           \
  bfloat& operator op##=(bfloat & a, T b) { return a = bfloat(float(a) op float(b)); }
EMULATOR_OPERATOR(+)
EMULATOR_OPERATOR(-)
EMULATOR_OPERATOR(*)
EMULATOR_OPERATOR(/)
#undef EMULATOR_OPERATOR

typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {

template <typename T, int N>
struct Elements;
template <typename T>
struct alignas(2 * sizeof(T)) Elements<T, 2> {
  union { struct { T x, y; }; T all[2]; };
};
template <typename T>
struct alignas(4 * sizeof(T)) Elements<T, 3> {
  union { struct { T x, y, z; }; T all[3]; };
};
template <typename T>
struct alignas(4 * sizeof(T)) Elements<T, 4> {
  union { struct { T x, y, z, w; }; T all[4]; };
};

template <typename T, int N>
struct vec : Elements<T, N> {
  vec() = default;
  vec(T value) { for (T& element : this->all) element = value; }
  template <typename... U, typename = std::enable_if_t<sizeof...(U) == N>>
  vec(U... values) {
    T* element = this->all;
    ((*element++ = T(values)), ...);
  }
  template <typename U>
  explicit vec(vec<U, N> other) { for (int i = 0; i < N; i++) this->all[i] = T(other.all[i]); }
  T& operator[](uint i) { return this->all[i]; }
  T operator[](uint i) const { return this->all[i]; }

#define EMULATOR_OPERATOR(op)                               \
  friend vec operator op(vec a, vec b) {                    \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b[i]);     \
    return a;                                               \
  }                                                         \
  friend vec& operator op##=(vec & a, vec b) { return a = a op b; }
  EMULATOR_OPERATOR(+)
  EMULATOR_OPERATOR(-)
  EMULATOR_OPERATOR(*)
  EMULATOR_OPERATOR(/)
  EMULATOR_OPERATOR(&)
  EMULATOR_OPERATOR(|)
  EMULATOR_OPERATOR(^)
  EMULATOR_OPERATOR(<<)
  EMULATOR_OPERATOR(>>)
#undef EMULATOR_OPERATOR
};

#define EMULATOR_VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
EMULATOR_VECTORS(char) EMULATOR_VECTORS(uchar) EMULATOR_VECTORS(short) EMULATOR_VECTORS(ushort)
EMULATOR_VECTORS(int) EMULATOR_VECTORS(uint) EMULATOR_VECTORS(long) EMULATOR_VECTORS(ulong)
EMULATOR_VECTORS(half) EMULATOR_VECTORS(bfloat) EMULATOR_VECTORS(float)
#undef EMULATOR_VECTORS

// Functions of a half or a bfloat compute in float and round once.
#define EMULATOR_FUNCTION(name, expression)                                        \
  template <typename T>                                                            \
  T name(T value) {                                                                \
    static_assert(!std::is_integral_v<T>, #name " takes a floating-point number"); \
    float x = value;                                                               \
    return T(expression);                                                          \
  }
EMULATOR_FUNCTION(exp, __builtin_expf(x))
EMULATOR_FUNCTION(exp2, __builtin_exp2f(x))
EMULATOR_FUNCTION(log, __builtin_logf(x))
EMULATOR_FUNCTION(log2, __builtin_log2f(x))
EMULATOR_FUNCTION(sqrt, __builtin_sqrtf(x))
EMULATOR_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))
EMULATOR_FUNCTION(sin, __builtin_sinf(x))
EMULATOR_FUNCTION(cos, __builtin_cosf(x))
EMULATOR_FUNCTION(tanh, __builtin_tanhf(x))
EMULATOR_FUNCTION(fabs, __builtin_fabsf(x))
EMULATOR_FUNCTION(floor, __builtin_floorf(x))
EMULATOR_FUNCTION(ceil, __builtin_ceilf(x))
EMULATOR_FUNCTION(rint, __builtin_rintf(x))
#undef EMULATOR_FUNCTION

template <typename T> T fma(T a, T b, T c) { return T(__builtin_fmaf(float(a), float(b), float(c))); }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T> T select(T no, T yes, bool condition) { return condition ? yes : no; }
template <typename T> bool isnan(T x) { return x != x; }
template <typename T> bool isinf(T x) { return fabs(x) == INFINITY; }

template <typename T>
T abs(T x) {
  if constexpr (std::is_integral_v<T>) return x < 0 ? -x : x;
  else return fabs(x);
}

template <typename T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}

template <typename T>
T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return 0;
  uint unused = 8 * sizeof(T) - bits;
  return T(T(x << (unused - offset)) >> unused);
}

template <typename T>
T insert_bits(T base, T insert, uint offset, uint bits) {
  T mask = bits == 0 ? 0 : T(T(-1) << (8 * sizeof(T) - bits)) >> (8 * sizeof(T) - bits) << offset;
  return T((base & ~mask) | (insert << offset & mask));
}

namespace fast = ::metal;
namespace precise = ::metal;

}  // namespace metal

#include "threads.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

// __builtin_LINE as a default argument is the line of the call.
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  emulator::wait(emulator::threadgroup_barrier, line);
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  emulator::exchange(0, "simdgroup_barrier", line);
}

template <typename T>
T simd_sum(T value, int line = __builtin_LINE()) {  // MLX sums bfloat in float; Metal does not say how it sums half
  constexpr bool narrow = std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
  typedef std::conditional_t<narrow, float, T> Sum;
  return T(emulator::reduce(Sum(value), [](Sum a, Sum b) { return Sum(a + b); }, "simd_sum", line));
}
template <typename T>
T simd_max(T value, int line = __builtin_LINE()) {
  return emulator::reduce(value, max<T>, "simd_max", line);
}
template <typename T>
T simd_min(T value, int line = __builtin_LINE()) {
  return emulator::reduce(value, min<T>, "simd_min", line);
}
template <typename T>
T simd_shuffle(T value, uint lane, int line = __builtin_LINE()) {
  return emulator::from_lane(value, lane, "simd_shuffle", line);
}
template <typename T>
T simd_broadcast(T value, uint lane, int line = __builtin_LINE()) {
  return emulator::from_lane(value, lane, "simd_broadcast", line);
}
template <typename T>
T simd_shuffle_xor(T value, uint mask, int line = __builtin_LINE()) {
  return emulator::from_lane(value, emulator::self->thread_index_in_simdgroup ^ mask, "simd_shuffle_xor", line);
}
template <typename T>
T simd_shuffle_down(T value, uint delta, int line = __builtin_LINE()) {  // the last `delta` lanes keep their own values
  uint own = emulator::self->thread_index_in_simdgroup;
  return emulator::from_lane(value, own + delta < 32 ? own + delta : own, "simd_shuffle_down", line);
}

}  // namespace metal

using namespace metal;

#define METAL_FUNC inline
#define kernel
#define device
#define constant
#define thread
#define threadgroup  // of pointers; the declaration of a variable is rewritten before this word is seen
#define double double_is_no_type_of_Metal
