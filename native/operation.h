// What the lazy MLX operations of this library share.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"

namespace flashmoe {

// Work that a CPU stream runs, with the addresses of its arrays.
using Task = std::function<void()>;

// An MLX operation that runs on the CPU and, unless it overrides readable(), takes contiguous arrays.
class Operation : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  // Returns the work of one call. The memory of the outputs is allocated; nothing is computed yet.
  virtual Task prepare(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) = 0;

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override;

 protected:
  // Returns the inputs, with copies in place of those that are not contiguous. The stream keeps the copies alive until
  // it has used them.
  virtual std::vector<mlx::core::array> readable(const std::vector<mlx::core::array>& inputs) const;
};

// Throws std::invalid_argument, in Python a ValueError, if an operand is not what an operation takes.
inline void require(bool condition, const char* message) {
  if (!condition) {
    throw std::invalid_argument(message);
  }
}

// Rounds up to whole SIMD registers, whatever the instruction set.
inline int64_t padded(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

// Scratch memory of the calling thread, aligned to 64 bytes and valid until its next call.
float* scratch(size_t floats);

}  // namespace flashmoe
