#include "kernels.h"

namespace flashmoe {

const Kernels& kernels() {
  static const Kernels* chosen = [] {
#ifdef FLASHMOE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return avx512_kernels();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return avx2_kernels();
    }
#endif
    return portable_kernels();
  }();
  return *chosen;
}

}  // namespace flashmoe
