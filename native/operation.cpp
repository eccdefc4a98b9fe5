#include "operation.h"

#include <cstring>
#include <memory>

#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// Bytes of scratch memory that a thread keeps. More is freed again when a smaller piece is wanted.
constexpr size_t MAX_KEPT = 4 << 20;
constexpr size_t ALIGNMENT = 64;

}  // namespace

float* scratch(size_t floats) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t nbytes = 0;
  const size_t wanted = floats * sizeof(float) + ALIGNMENT;
  if (nbytes < wanted || (nbytes > MAX_KEPT && wanted <= MAX_KEPT)) {
    memory.reset();
    nbytes = 0;
    memory.reset(new char[wanted]);
    nbytes = wanted;
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
}

std::vector<mx::array> Operation::readable(const std::vector<mx::array>& inputs) const {
  std::vector<mx::array> contiguous = inputs;
  for (mx::array& input : contiguous) {
    if (input.flags().row_contiguous) {
      continue;
    }
    mx::array copy(input.shape(), input.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    // MLX has functions that copy, but its library does not export them.
    auto& encoder = mx::cpu::get_command_encoder(const_cast<Operation*>(this)->stream());
    encoder.dispatch([from = input.data<char>(),
                      to = copy.data<char>(),
                      size = static_cast<int64_t>(input.size()),
                      run = input.ndim() && input.strides().back() == 1 ? input.shape(-1) : 1,
                      itemsize = static_cast<int64_t>(input.itemsize()),
                      shape = input.shape(),
                      strides = input.strides()] {
      for (int64_t i = 0; i < size; i += run) {
        std::memcpy(to + i * itemsize, from + mx::elem_to_loc(i, shape, strides) * itemsize, run * itemsize);
      }
    });
    encoder.add_temporary(copy);
    input = copy;
  }
  return contiguous;
}

void Operation::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (mx::array& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  const std::vector<mx::array> operands = readable(inputs);
  mx::cpu::get_command_encoder(stream()).dispatch(prepare(operands, outputs));
}

void Operation::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error("[flashmoe] native kernels run on the CPU only: set mx.set_default_device(mx.cpu).");
}

}  // namespace flashmoe
