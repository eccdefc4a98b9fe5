#include "products.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "mlx/utils.h"
#include "operation.h"
#include "parallel_products.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

enum class Kind { linear, matvec, gate_up };

class QuantizedProduct : public Operation {
 public:
  QuantizedProduct(mx::Stream stream, Kind kind, Format format) : Operation(stream), kind_(kind), format_(format) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    size_t next = 0;
    Product product{};
    const mx::array& x = inputs[next++];
    const int64_t columns = x.shape(-1);
    product.x = x.data<float>();
    product.vectors = product.pairs = x.size() / columns;
    if (kind_ != Kind::linear) {
      product.slots = inputs[next].data<uint32_t>();
      product.pairs = inputs[next++].size();
    }
    product.matrix = next_matrix(inputs, next, format_, columns);
    if (kind_ == Kind::gate_up) {
      product.up = next_matrix(inputs, next, format_, columns);
    }
    product.out = outputs[0].data<float>();
    if (product.pairs == 0 || product.matrix.rows == 0) {
      return [] {};
    }
    return [product] { multiply(std::array{product}); };
  }

  const char* name() const override {
    return "FlashMoEProduct";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& product = static_cast<const QuantizedProduct&>(other);
    return kind_ == product.kind_ && format_ == product.format_;
  }

 private:
  Kind kind_;
  Format format_;
};

// Slots are [..., top_k], with the same leading axes as x, which has `trailing` axes behind them.
void check_slots(const mx::array& slots, const mx::array& x, size_t trailing) {
  require(slots.dtype() == mx::uint32, "slots must be uint32");
  require(
      slots.ndim() >= 1 && x.ndim() == slots.ndim() + trailing - 1 &&
          std::equal(x.shape().begin(), x.shape().end() - 1, slots.shape().begin()),
      "x and slots do not match");
}

// [..., top_k, rows]
mx::Shape shape_of(const mx::array& slots, const mx::array& weight) {
  mx::Shape shape = slots.shape();
  shape.push_back(weight.shape(1));
  return shape;
}

mx::array make(Kind kind, Format format, mx::Shape shape, std::vector<mx::array> inputs) {
  auto product = std::make_shared<QuantizedProduct>(mx::to_stream({}), kind, format);
  return mx::array(std::move(shape), mx::float32, std::move(product), std::move(inputs));
}

}  // namespace

mx::array linear(const mx::array& x, const Quantized& matrix, Format format) {
  check(matrix, format, x, 2);
  mx::Shape shape = x.shape();
  shape.back() = matrix.weight.shape(0);
  return make(Kind::linear, format, std::move(shape), {x, matrix.weight, matrix.scales, matrix.biases});
}

mx::array matvec(const mx::array& x, const mx::array& slots, const Quantized& matrix, Format format) {
  check(matrix, format, x, 3);
  check_slots(slots, x, 2);
  return make(
      Kind::matvec, format, shape_of(slots, matrix.weight), {x, slots, matrix.weight, matrix.scales, matrix.biases});
}

mx::array gate_up(
    const mx::array& x, const mx::array& slots, const Quantized& gate, const Quantized& up, Format format) {
  check(gate, format, x, 3);
  check(up, format, x, 3);
  check_slots(slots, x, 1);
  require(gate.weight.shape() == up.weight.shape(), "gate and up differ in shape");
  return make(
      Kind::gate_up,
      format,
      shape_of(slots, gate.weight),
      {x, slots, gate.weight, gate.scales, gate.biases, up.weight, up.scales, up.biases});
}

}  // namespace flashmoe
