// Several operations of this library, fused into one.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "operation.h"

namespace flashmoe {

// A recorded sequence of operations that later calls run as a single one. An operation costs MLX as much time as
// reading 100 KB of weights does.
class Chain {
 public:
  // Records the graph from inputs to outputs. Other arrays that it reads are constants: evaluated now, and kept. Throws
  // std::invalid_argument if the graph has an operation that is not of this library.
  Chain(const std::vector<mlx::core::array>& inputs, const std::vector<mlx::core::array>& outputs);

  // Returns the outputs for other inputs, lazily, or nothing if shapes or dtypes are not those of the recorded inputs.
  std::optional<std::vector<mlx::core::array>> operator()(const std::vector<mlx::core::array>& inputs) const;

 private:
  class Run;

  // Arrays are numbered: first the inputs, then the constants, then what the steps compute.
  struct Step {
    std::shared_ptr<Operation> operation;
    std::vector<size_t> inputs, outputs;
  };

  // An array that a step computes: an output of the chain, or memory of an intermediate at a byte offset.
  struct Computed {
    mlx::core::Shape shape;
    mlx::core::Dtype dtype;
    std::optional<size_t> output;
    size_t offset;
  };

  struct Recording {
    std::vector<mlx::core::array> constants;
    std::vector<Computed> computed;
    std::vector<Step> steps;
    size_t nbytes;
  };

  std::vector<std::pair<mlx::core::Shape, mlx::core::Dtype>> inputs_;
  std::vector<mlx::core::Shape> output_shapes_;
  std::vector<mlx::core::Dtype> output_dtypes_;
  std::shared_ptr<Recording> recording_;
};

}  // namespace flashmoe
