#include "embedding.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "mlx/types/half_types.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

class Embedding : public Operation {
 public:
  Embedding(mx::Stream stream, Format format) : Operation(stream), format_(format) {}

  Task prepare(const std::vector<mx::array>& in, std::vector<mx::array>& outputs) override {
    switch (in[2].dtype().val()) {
      case mx::Dtype::Val::float16: return rows<mx::float16_t>(in, outputs[0]);
      case mx::Dtype::Val::bfloat16: return rows<mx::bfloat16_t>(in, outputs[0]);
      default: return rows<float>(in, outputs[0]);
    }
  }

  const char* name() const override {
    return "FlashMoEEmbedding";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const Embedding&>(other).format_;
  }

 private:
  template <typename Scale>
  Task rows(const std::vector<mx::array>& in, mx::array& out) const {
    return [numbers = in[0].data<uint32_t>(),
            count = static_cast<int64_t>(in[0].size()),
            weight = in[1].data<uint32_t>(),
            words = static_cast<int64_t>(in[1].shape(1)),
            last = static_cast<uint32_t>(in[1].shape(0) - 1),
            scales = in[2].data<Scale>(),
            biases = in[3].data<Scale>(),
            groups = static_cast<int64_t>(in[2].shape(1)),
            out = out.data<float>(),
            format = format_] {
      Workers::shared().run(count, [&](int64_t item, int) {
        const int64_t row = std::min(numbers[item], last);
        const uint32_t* const packed = weight + row * words;
        float* const to = out + item * groups * format.group;
        for (int64_t i = 0; i < groups * format.group; ++i) {
          const int64_t group = row * groups + i / format.group;
          const int64_t bit = i * format.bits;
          const int shift = bit % 32;
          uint32_t q = packed[bit / 32] >> shift;
          if (shift + format.bits > 32) {
            q |= packed[bit / 32 + 1] << (32 - shift);
          }
          q &= (1u << format.bits) - 1;
          to[i] = static_cast<float>(scales[group]) * static_cast<float>(q) + static_cast<float>(biases[group]);
        }
      });
    };
  }

  Format format_;
};

}  // namespace

mx::array embed(const mx::array& numbers, const Quantized& matrix, Format format) {
  require(numbers.dtype() == mx::uint32, "numbers must be uint32");
  require(matrix.weight.ndim() == 2 && matrix.weight.size() > 0, "weight must be [rows, words] and must not be empty");
  check(format);
  mx::Shape shape = numbers.shape();
  shape.push_back(matrix.weight.shape(-1) * 32 / format.bits);
  check(matrix, format, shape.back(), 2);
  return mx::array(
      shape,
      mx::float32,
      std::make_shared<Embedding>(mx::to_stream({}), format),
      {numbers, matrix.weight, matrix.scales, matrix.biases});
}

}  // namespace flashmoe
