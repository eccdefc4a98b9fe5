// The inner loops of all operations, compiled once for each instruction set.
//
// CMake defines LANES (floats in a SIMD register), SET_NAME, and KERNELS, the name of the function that returns the
// table. Code in loops/ has internal linkage and calls no function template of the standard library: the linker would
// keep one copy of it for all instruction sets, and a CPU might meet instructions that it does not have.

#include "kernels.h"

#include "loops/attention.h"
#include "loops/gated_delta.h"
#include "loops/norm.h"
#include "loops/products.h"
#include "loops/softmax.h"

namespace flashmoe {
namespace {

constexpr Kernels TABLE = {
    .name = SET_NAME,
    .buffer_sizes = buffer_sizes,
    .pack_vector = pack_vector,
    .multiply = multiply,
    .swiglu = swiglu,
    .norm = norm,
    .combine = combine,
    .softmax_numerators = softmax_numerators,
    .convolve = convolve,
    .l2_normalize = l2_normalize,
    .gated_delta_step = gated_delta_step,
    .gated_norm = gated_norm,
    .attention = attention,
    .sigmoid_gate = sigmoid_gate,
};

}  // namespace

const Kernels* KERNELS() {
  return &TABLE;
}

}  // namespace flashmoe
