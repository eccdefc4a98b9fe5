#include "inputs.h"

#include <cstring>

#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"

namespace mx = mlx::core;

namespace flashmoe {

std::vector<mx::array> contiguous_inputs(const std::vector<mx::array>& inputs, const mx::Stream& stream) {
  std::vector<mx::array> contiguous = inputs;
  for (mx::array& input : contiguous) {
    if (input.flags().row_contiguous) {
      continue;
    }
    mx::array copy(input.shape(), input.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    // MLX's own copies are not among the functions that its library exports.
    auto& encoder = mx::cpu::get_command_encoder(stream);
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

}  // namespace flashmoe
