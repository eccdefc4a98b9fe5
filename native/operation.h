// What all lazy MLX operations of this library have in common, and several of them as one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"

namespace flashmoe {

using Task = std::function<void()>;

// An operation on the CPU, of arrays whose elements lie one after the other in memory.
class Operation : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  // What is to run, with the addresses of all arrays. The outputs have their memory.
  virtual Task prepare(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) = 0;

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override;

 protected:
  // The inputs as they are, if they lie so, or copies that live until the stream has used them.
  virtual std::vector<mlx::core::array> arranged(const std::vector<mlx::core::array>& inputs) const;
};

// Throws std::invalid_argument if something is not as an operation needs it.
inline void require(bool condition, const char* what) {
  if (!condition) {
    throw std::invalid_argument(what);
  }
}

// So many floats that whole registers of any size hold them.
inline int64_t padded(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

// Memory for floats that the running task needs for itself, at a multiple of 64 bytes. The next call takes it back.
float* scratch(size_t floats);

// Some operations that run as one. An operation that follows another costs MLX as much as reading 100 KB of weights.
class Chain {
 public:
  // All that makes the outputs of the inputs. Other arrays that it needs are evaluated and belong to it from now on.
  // Throws std::invalid_argument if an operation is not one of this library.
  Chain(const std::vector<mlx::core::array>& inputs, const std::vector<mlx::core::array>& outputs);

  // The same of other inputs, lazily; nothing, if their shapes are not those of the first ones.
  std::optional<std::vector<mlx::core::array>> operator()(const std::vector<mlx::core::array>& inputs) const;

 private:
  class Run;

  struct Step {
    std::shared_ptr<Operation> operation;
    std::vector<size_t> inputs, outputs;  // places
  };

  // A place for an array: an input's, then constants', then those that steps make.
  struct Made {
    mlx::core::Shape shape;
    mlx::core::Dtype dtype;
    std::optional<size_t> output;  // of the chain; or it is memory of its own,
    size_t offset;                 // at so many bytes
  };

  struct Steps {
    std::vector<mlx::core::array> constants;
    std::vector<Made> made;
    std::vector<Step> steps;
    size_t inputs, nbytes;
  };

  std::vector<std::pair<mlx::core::Shape, mlx::core::Dtype>> takes_;
  std::vector<mlx::core::Shape> shapes_;  // of outputs
  std::vector<mlx::core::Dtype> dtypes_;
  std::shared_ptr<Steps> steps_;
};

}  // namespace flashmoe
