#include "chain.h"

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// Of intermediates, in bytes.
constexpr size_t ALIGNMENT = 64;

}  // namespace

class Chain::Run : public Operation {
 public:
  Run(mx::Stream stream, std::shared_ptr<Recording> recording) : Operation(stream), recording_(std::move(recording)) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<mx::array> arrays = inputs;
    arrays.insert(arrays.end(), recording_->constants.begin(), recording_->constants.end());
    mx::array memory({static_cast<int>(recording_->nbytes)}, mx::uint8, nullptr, {});
    memory.set_data(mx::allocator::malloc(recording_->nbytes));
    for (const Computed& each : recording_->computed) {
      if (each.output) {
        arrays.push_back(outputs[*each.output]);
        continue;
      }
      mx::array own(each.shape, each.dtype, nullptr, {});
      own.copy_shared_buffer(memory, own.strides(), memory.flags(), own.size(), each.offset / own.itemsize());
      arrays.push_back(own);
    }
    std::vector<Task> tasks;
    tasks.reserve(recording_->steps.size());
    for (const Step& step : recording_->steps) {
      std::vector<mx::array> in, out;
      for (size_t number : step.inputs) {
        in.push_back(arrays[number]);
      }
      for (size_t number : step.outputs) {
        out.push_back(arrays[number]);
      }
      tasks.push_back(step.operation->prepare(in, out));
    }
    mx::cpu::get_command_encoder(stream()).add_temporary(memory);
    return [tasks = std::move(tasks), recording = recording_] {
      for (const Task& task : tasks) {
        task();
      }
    };
  }

  const char* name() const override {
    return "FlashMoEChain";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return recording_ == static_cast<const Run&>(other).recording_;
  }

 private:
  std::shared_ptr<Recording> recording_;
};

Chain::Chain(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs)
    : recording_(std::make_shared<Recording>()) {
  std::vector<mx::array>& constants = recording_->constants;
  std::vector<Computed>& computed = recording_->computed;
  // The numbers of inputs and constants, and the places of the others in `computed`, by array.
  std::unordered_map<std::uintptr_t, size_t> given, made;
  for (const mx::array& input : inputs) {
    if (!given.emplace(input.id(), given.size()).second) {
      throw std::invalid_argument("an array is passed twice as an input of a chain");
    }
    inputs_.emplace_back(input.shape(), input.dtype());
  }
  // One output of each operation, in an order in which they can run.
  std::vector<mx::array> order;
  std::function<void(const mx::array&)> visit = [&](const mx::array& array) {
    if (given.contains(array.id()) || made.contains(array.id())) {
      return;
    }
    if (!array.has_primitive()) {
      given[array.id()] = inputs.size() + constants.size();
      constants.push_back(array);
      return;
    }
    if (!dynamic_cast<Operation*>(&array.primitive())) {
      throw std::invalid_argument(
          std::string(array.primitive().name()) + " is not an operation of this library: it cannot be part of a chain");
    }
    for (const mx::array& input : array.inputs()) {
      visit(input);
    }
    auto siblings = const_cast<mx::array&>(array).outputs();
    for (const mx::array& sibling : siblings) {
      made[sibling.id()] = computed.size();
      computed.push_back({sibling.shape(), sibling.dtype(), std::nullopt, 0});
    }
    order.push_back(array);
  };
  for (const mx::array& output : outputs) {
    visit(output);
    if (!made.contains(output.id()) || computed[made[output.id()]].output) {
      throw std::invalid_argument("an output of a chain must be computed by it, and be passed once");
    }
    computed[made[output.id()]].output = output_shapes_.size();
    output_shapes_.push_back(output.shape());
    output_dtypes_.push_back(output.dtype());
  }
  mx::eval(constants);
  for (mx::array& constant : constants) {
    if (!constant.flags().row_contiguous) {
      throw std::invalid_argument("a constant of a chain must be contiguous");
    }
  }
  recording_->nbytes = 0;
  for (Computed& each : computed) {
    if (!each.output) {
      each.offset = recording_->nbytes;
      size_t size = size_of(each.dtype);
      for (int n : each.shape) {
        size *= n;
      }
      recording_->nbytes += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
  }
  auto number_of = [&](const mx::array& array) {
    const auto found = made.find(array.id());
    return found != made.end() ? inputs.size() + constants.size() + found->second : given.at(array.id());
  };
  for (mx::array& array : order) {
    Step step{std::dynamic_pointer_cast<Operation>(array.primitive_ptr()), {}, {}};
    for (const mx::array& input : array.inputs()) {
      step.inputs.push_back(number_of(input));
    }
    for (const mx::array& output : array.outputs()) {
      step.outputs.push_back(number_of(output));
    }
    recording_->steps.push_back(std::move(step));
  }
}

std::optional<std::vector<mx::array>> Chain::operator()(const std::vector<mx::array>& inputs) const {
  if (inputs.size() != inputs_.size()) {
    return std::nullopt;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].shape() != inputs_[i].first || inputs[i].dtype() != inputs_[i].second) {
      return std::nullopt;
    }
  }
  return mx::array::make_arrays(
      output_shapes_, output_dtypes_, std::make_shared<Run>(mx::to_stream({}), recording_), inputs);
}

}  // namespace flashmoe
