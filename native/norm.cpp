#include "norm.h"

#include <cstdint>
#include <memory>
#include <utility>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// All three operations, which differ in their inputs:
//
//   rms_norm  x, weight
//   add_norm  x, y, weight
//   combine   x, y, scores, shared, weight
class Norm : public Operation {
 public:
  Norm(mx::Stream stream, float eps) : Operation(stream), eps_(eps) {}

  Task prepare(const std::vector<mx::array>& in, std::vector<mx::array>& outputs) override {
    const int64_t size = in.back().size();
    auto address = [&](size_t i) { return i + 1 < in.size() ? in[i].data<float>() : nullptr; };
    return [x = in[0].data<float>(),
            y = address(1),
            scores = address(2),
            shared = address(3),
            weight = in.back().data<float>(),
            sum = outputs.size() > 1 ? outputs[0].data<float>() : nullptr,
            normed = outputs.back().data<float>(),
            rows = static_cast<int64_t>(in[0].size()) / size,
            count = in.size() > 4 ? static_cast<int64_t>(in[2].shape(-1)) - 1 : 0,
            size,
            eps = eps_] {
      const Kernels& kernel = kernels();
      Workers::shared().run(rows, [&](int64_t row, int) {
        const int64_t at = row * size;
        if (shared) {
          kernel.combine(x + at, y + at * count, scores + row * (count + 1), count, shared + at, size, sum + at);
          kernel.norm(sum + at, nullptr, weight, eps, size, nullptr, normed + at);
        } else {
          kernel.norm(x + at, y ? y + at : nullptr, weight, eps, size, y ? sum + at : nullptr, normed + at);
        }
      });
    };
  }

  const char* name() const override {
    return "FlashMoENorm";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const Norm&>(other).eps_;
  }

 private:
  float eps_;
};

void check(const mx::array& x, const mx::array& weight) {
  require(
      x.dtype() == mx::float32 && weight.dtype() == mx::float32 && weight.ndim() == 1 && x.ndim() >= 1 &&
          weight.size() > 0 && x.shape(-1) == weight.shape(0),
      "x must be float32 [..., size] and weight float32 [size]");
}

std::vector<mx::array> sum_and_norm(std::vector<mx::array> inputs, float eps) {
  const mx::Shape shape = inputs[0].shape();
  return mx::array::make_arrays(
      {shape, shape}, {mx::float32, mx::float32}, std::make_shared<Norm>(mx::to_stream({}), eps), std::move(inputs));
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  check(x, weight);
  return mx::array(x.shape(), mx::float32, std::make_shared<Norm>(mx::to_stream({}), eps), {x, weight});
}

std::vector<mx::array> add_norm(const mx::array& x, const mx::array& y, const mx::array& weight, float eps) {
  check(x, weight);
  require(y.shape() == x.shape() && y.dtype() == mx::float32, "y must have the shape and dtype of x");
  return sum_and_norm({x, y, weight}, eps);
}

std::vector<mx::array> combine(
    const mx::array& x,
    const mx::array& y,
    const mx::array& scores,
    const mx::array& shared,
    const mx::array& weight,
    float eps) {
  check(x, weight);
  require(shared.shape() == x.shape() && shared.dtype() == mx::float32, "shared must have the shape and dtype of x");
  require(scores.ndim() == x.ndim() && y.ndim() == x.ndim() + 1, "x, y and scores do not match");
  mx::Shape of_y = x.shape(), of_scores = x.shape();
  of_scores.back() = scores.shape(-1);
  of_y.insert(of_y.end() - 1, scores.shape(-1) - 1);
  require(
      scores.shape() == of_scores && y.shape() == of_y && y.dtype() == mx::float32 && scores.dtype() == mx::float32,
      "y must be float32 [..., top_k, size] and scores float32 [..., top_k + 1]");
  return sum_and_norm({x, y, scores, shared, weight}, eps);
}

}  // namespace flashmoe
