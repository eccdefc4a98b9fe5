// The inner loops of all operations, compiled once for each instruction set.
//
// CMake defines LANES (floats in a SIMD register), SET_NAME, and KERNELS, the name of the function that returns the table.
// Code in loops/ has internal linkage and calls no function template of the standard library: the linker would keep one
// copy of it for all instruction sets, and a CPU might meet instructions that it does not have.

#include "kernels.h"

#include "loops/attention.h"
#include "loops/gated_delta.h"
#include "loops/norm.h"
#include "loops/products.h"
#include "loops/softmax.h"

namespace flashmoe {
namespace {

constexpr Kernels KERNELS_OF_THIS_SET = {
    SET_NAME, layout,   arrange_any, multiply_any, norm, combine,    soften,
    convolve, normalize, gated_norm,  gate,         swiglu, delta_step, attend};

}  // namespace

const Kernels* KERNELS() {
  return &KERNELS_OF_THIS_SET;
}

}  // namespace flashmoe
