#include "operation.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <unordered_map>

#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

constexpr size_t KEPT = 4 << 20;  // bytes of scratch that a thread keeps
constexpr size_t ALIGNED = 64;

std::vector<mx::array> contiguous(const std::vector<mx::array>& inputs, const mx::Stream& stream) {
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

}  // namespace

float* scratch(size_t floats) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t nbytes = 0;
  const size_t wanted = floats * sizeof(float) + ALIGNED;
  if (nbytes < wanted || (nbytes > KEPT && wanted <= KEPT)) {
    memory.reset();
    nbytes = 0;
    memory.reset(new char[wanted]);
    nbytes = wanted;
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + ALIGNED - 1) & ~(ALIGNED - 1));
}

std::vector<mx::array> Operation::arranged(const std::vector<mx::array>& inputs) const {
  return contiguous(inputs, const_cast<Operation*>(this)->stream());
}

void Operation::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (mx::array& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  const std::vector<mx::array> in = arranged(inputs);
  mx::cpu::get_command_encoder(stream()).dispatch(prepare(in, outputs));
}

void Operation::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error("[flashmoe] an operation of the CPU was asked of a GPU.");
}

class Chain::Run : public Operation {
 public:
  Run(mx::Stream stream, std::shared_ptr<Steps> steps) : Operation(stream), steps_(std::move(steps)) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<mx::array> places = inputs;
    places.insert(places.end(), steps_->constants.begin(), steps_->constants.end());
    mx::array memory({static_cast<int>(steps_->nbytes)}, mx::uint8, nullptr, {});
    memory.set_data(mx::allocator::malloc(steps_->nbytes));
    for (const Made& made : steps_->made) {
      if (made.output) {
        places.push_back(outputs[*made.output]);
        continue;
      }
      mx::array own(made.shape, made.dtype, nullptr, {});
      own.copy_shared_buffer(memory, own.strides(), memory.flags(), own.size(), made.offset / own.itemsize());
      places.push_back(own);
    }
    std::vector<Task> tasks;
    tasks.reserve(steps_->steps.size());
    for (const Step& step : steps_->steps) {
      std::vector<mx::array> in, out;
      for (size_t place : step.inputs) {
        in.push_back(places[place]);
      }
      for (size_t place : step.outputs) {
        out.push_back(places[place]);
      }
      tasks.push_back(step.operation->prepare(in, out));
    }
    mx::cpu::get_command_encoder(stream()).add_temporary(memory);
    return [tasks = std::move(tasks), steps = steps_] {
      for (const Task& task : tasks) {
        task();
      }
    };
  }

  const char* name() const override {
    return "FlashMoEChain";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return steps_ == static_cast<const Run&>(other).steps_;
  }

 private:
  std::shared_ptr<Steps> steps_;
};

Chain::Chain(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs)
    : steps_(std::make_shared<Steps>()) {
  std::unordered_map<std::uintptr_t, size_t> places;  // of inputs and constants, then those of `made` from `first` on
  std::unordered_map<std::uintptr_t, size_t> made;
  for (const mx::array& input : inputs) {
    if (!places.emplace(input.id(), places.size()).second) {
      throw std::invalid_argument("an input is there twice");
    }
    takes_.emplace_back(input.shape(), input.dtype());
  }
  steps_->inputs = inputs.size();
  std::vector<mx::array> order;  // one output of each operation
  std::function<void(const mx::array&)> visit = [&](const mx::array& array) {
    if (places.contains(array.id()) || made.contains(array.id())) {
      return;
    }
    if (!array.has_primitive()) {
      places[array.id()] = inputs.size() + steps_->constants.size();
      steps_->constants.push_back(array);
      return;
    }
    if (!dynamic_cast<Operation*>(&array.primitive())) {
      throw std::invalid_argument(std::string(array.primitive().name()) + " is no operation of this library");
    }
    for (const mx::array& input : array.inputs()) {
      visit(input);
    }
    auto siblings = const_cast<mx::array&>(array).outputs();
    for (const mx::array& sibling : siblings) {
      made[sibling.id()] = steps_->made.size();
      steps_->made.push_back({sibling.shape(), sibling.dtype(), std::nullopt, 0});
    }
    order.push_back(array);
  };
  for (const mx::array& output : outputs) {
    visit(output);
    if (!made.contains(output.id()) || steps_->made[made[output.id()]].output) {
      throw std::invalid_argument("an output is an input, a constant or another output");
    }
    steps_->made[made[output.id()]].output = shapes_.size();
    shapes_.push_back(output.shape());
    dtypes_.push_back(output.dtype());
  }
  mx::eval(steps_->constants);
  for (mx::array& constant : steps_->constants) {
    if (!constant.flags().row_contiguous) {
      throw std::invalid_argument("a constant does not lie in a row");
    }
  }
  steps_->nbytes = 0;
  for (Made& each : steps_->made) {
    if (!each.output) {
      each.offset = steps_->nbytes;
      size_t size = size_of(each.dtype);
      for (int n : each.shape) {
        size *= n;
      }
      steps_->nbytes += (size + ALIGNED - 1) / ALIGNED * ALIGNED;
    }
  }
  const size_t first = inputs.size() + steps_->constants.size();
  auto place = [&](const mx::array& array) {
    const auto found = made.find(array.id());
    return found != made.end() ? first + found->second : places.at(array.id());
  };
  for (mx::array& array : order) {
    Step step{std::dynamic_pointer_cast<Operation>(array.primitive_ptr()), {}, {}};
    for (const mx::array& input : array.inputs()) {
      step.inputs.push_back(place(input));
    }
    for (const mx::array& output : array.outputs()) {
      step.outputs.push_back(place(output));
    }
    steps_->steps.push_back(std::move(step));
  }
}

std::optional<std::vector<mx::array>> Chain::operator()(const std::vector<mx::array>& inputs) const {
  if (inputs.size() != takes_.size()) {
    return std::nullopt;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].shape() != takes_[i].first || inputs[i].dtype() != takes_[i].second) {
      return std::nullopt;
    }
  }
  return mx::array::make_arrays(shapes_, dtypes_, std::make_shared<Run>(mx::to_stream({}), steps_), inputs);
}

}  // namespace flashmoe
