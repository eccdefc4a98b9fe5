#include "norm.h"

#include <cmath>
#include <stdexcept>

#include "inputs.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

class RMSNorm : public mx::UnaryPrimitive {
 public:
  RMSNorm(mx::Stream stream, float eps) : UnaryPrimitive(stream), eps_(eps) {}

  void eval_cpu(const std::vector<mx::array>& given, mx::array& output) override {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const std::vector<mx::array> inputs = contiguous_inputs(given, stream());
    const int64_t size = inputs[1].size();
    encoder.dispatch([x = inputs[0].data<float>(),
                      weight = inputs[1].data<float>(),
                      out = output.data<float>(),
                      rows = static_cast<int64_t>(output.size()) / size,
                      size,
                      eps = eps_] {
      Workers::shared().run(rows, [&](int64_t row, int) {
        const float* const from = x + row * size;
        float* const to = out + row * size;
        double squares = 0;
        for (int64_t i = 0; i < size; ++i) {
          squares += static_cast<double>(from[i]) * from[i];
        }
        const float norm = 1.0f / std::sqrt(static_cast<float>(squares / size) + eps);
        for (int64_t i = 0; i < size; ++i) {
          to[i] = from[i] * norm * weight[i];
        }
      });
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[flashmoe] a norm of the CPU was asked of a GPU.");
  }

  const char* name() const override {
    return "FlashMoERMSNorm";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RMSNorm&>(other).eps_;
  }

 private:
  float eps_;
};

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  if (x.dtype() != mx::float32 || weight.dtype() != mx::float32 || weight.ndim() != 1 || x.ndim() < 1 ||
      weight.size() == 0 || x.shape(-1) != weight.shape(0)) {
    throw std::invalid_argument("x must be float32 [..., size] and weight float32 [size]");
  }
  return mx::array(x.shape(), mx::float32, std::make_shared<RMSNorm>(mx::to_stream({}), eps), {x, weight});
}

}  // namespace flashmoe
