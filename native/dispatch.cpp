// Run-time dispatch: the kernels of the best instruction set that this CPU supports.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace flashmoe {
namespace {

bool is_supported([[maybe_unused]] const Kernels* kernels) {
#ifdef FLASHMOE_X86
  __builtin_cpu_init();
  if (kernels == avx512_kernels()) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (kernels == avx2_kernels()) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return true;
}

// The best first.
const Kernels* const all[] = {
#ifdef FLASHMOE_X86
    avx512_kernels(),
    avx2_kernels(),
#endif
    portable_kernels()};

std::atomic<const Kernels*> chosen = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!chosen) {
    for (const Kernels* each : all) {
      if (is_supported(each)) {
        chosen = each;
        break;
      }
    }
  }
  return *chosen;
}

bool choose_kernels(const char* name) {
  for (const Kernels* each : all) {
    if (std::strcmp(each->name, name) == 0 && is_supported(each)) {
      chosen = each;
      return true;
    }
  }
  return false;
}

}  // namespace flashmoe
