#include "products.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// What one call computes, with the addresses of its arrays.
struct Product {
  enum class Kind { plain, gate_up };

  Kind kind;
  Matrix matrix;               // the first of the slots
  Matrix up;                   // for gate_up
  const uint32_t* slots;       // [pairs]; none if there is one matrix
  const float* x;              // [vectors, columns]
  int64_t vectors;
  int64_t pairs;               // of a vector and a slot; as many pairs in a row share a vector as there are per vector
  float* out;                  // [pairs, rows]
};

constexpr uint32_t NO_SLOT = 0xffffffff;   // of an expert that is not in memory: products with it are zero
constexpr int64_t BATCH = 16;              // vectors that are multiplied at a time with the rows of a chunk
constexpr int64_t CHUNK_NBYTES = 1 << 18;  // of weights: memory is fast on long ways, and the second cache holds it

int64_t chunk_rows(const Product& product, int64_t groups) {
  const int64_t shares = Workers::shared().threads() * 8;
  const int64_t fair = (product.matrix.rows * groups + shares - 1) / shares;
  const int64_t most = CHUNK_NBYTES / (product.matrix.columns / 8 * product.matrix.bits);
  return std::clamp<int64_t>((std::min(fair, most) + 3) / 4 * 4, 4, MOST_CHUNK);
}

struct Needs {
  int64_t vectors, scratch, up;  // floats

  explicit Needs(const Product& product) {
    const Layout layout = kernels().layout(product.matrix);
    vectors = product.vectors * layout.arranged;
    scratch = padded(layout.scratch);
    up = product.kind == Product::Kind::gate_up ? BATCH * MOST_CHUNK : 0;
  }

  int64_t total() const {
    return vectors + Workers::shared().cores() * (scratch + up);
  }
};

Matrix in_slot(const Matrix& first, int64_t slot) {
  Matrix matrix = first;
  const int64_t size = first.stored == Scales::float32 ? 4 : 2;
  const int64_t groups = first.rows * first.columns / first.group * size;
  matrix.weight += slot * (first.rows * first.columns / 32 * first.bits);
  matrix.scales = static_cast<const char*>(first.scales) + slot * groups;
  matrix.biases = static_cast<const char*>(first.biases) + slot * groups;
  return matrix;
}

// The products of a call, as items that threads take: chunks of rows of one slot.
struct Plan {
  const Product& product;
  const Needs needs;
  const int64_t arranged;
  float *vectors, *scratch;
  std::vector<int64_t> order;         // pairs in the order of their slots: those of a slot are multiplied together
  std::vector<int64_t> begins = {0};  // of each slot's pairs
  int64_t chunk, chunks, items;

  explicit Plan(const Product& of)
      : product(of), needs(of), arranged(kernels().layout(of.matrix).arranged), order(of.pairs) {
    std::iota(order.begin(), order.end(), 0);
    if (product.slots) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return product.slots[a] < product.slots[b];
      });
      for (int64_t i = 1; i < product.pairs; ++i) {
        if (product.slots[order[i]] != product.slots[order[i - 1]]) {
          begins.push_back(i);
        }
      }
    }
    const int64_t groups = begins.size();
    begins.push_back(product.pairs);
    chunk = chunk_rows(product, groups);
    chunks = (product.matrix.rows + chunk - 1) / chunk;
    items = groups * chunks;
  }

  // Take as much memory as it needs, and return what is behind it.
  float* take(float* memory) {
    vectors = memory;
    scratch = vectors + needs.vectors;
    return scratch + Workers::shared().cores() * (needs.scratch + needs.up);
  }

  void arrange(int64_t vector) const {
    kernels().arrange(
        product.matrix, product.x + vector * product.matrix.columns, vectors + vector * arranged);
  }

  void multiply(int64_t item, int thread) const {
    const Kernels& kernel = kernels();
    const int64_t rows = product.matrix.rows;
    const int64_t share = product.pairs / product.vectors;
    const int64_t group = item / chunks;
    const int64_t begin = item % chunks * chunk;
    const int64_t end = std::min(rows, begin + chunk);
    const int64_t slot = product.slots ? product.slots[order[begins[group]]] : 0;
    if (slot == NO_SLOT) {
      for (int64_t pair = begins[group]; pair < begins[group + 1]; ++pair) {
        std::fill_n(product.out + order[pair] * rows + begin, end - begin, 0.0f);
      }
      return;
    }
    float* const own = scratch + thread * (needs.scratch + needs.up);
    for (int64_t first = begins[group]; first < begins[group + 1]; first += BATCH) {
      const int64_t count = std::min(BATCH, begins[group + 1] - first);
      const float* x[BATCH];
      float* out[BATCH];
      float* up[BATCH];
      for (int64_t i = 0; i < count; ++i) {
        x[i] = vectors + order[first + i] / share * arranged;
        out[i] = product.out + order[first + i] * rows + begin;
        up[i] = own + needs.scratch + i * MOST_CHUNK;
      }
      kernel.multiply(in_slot(product.matrix, slot), begin, end, x, out, count, own);
      if (product.kind == Product::Kind::gate_up) {
        kernel.multiply(in_slot(product.up, slot), begin, end, x, up, count, own);
        for (int64_t i = 0; i < count; ++i) {
          kernel.swiglu(out[i], up[i], end - begin);
        }
      }
    }
  }
};

// One after another for what goes before and after, but in one loop of all their chunks.
template <size_t COUNT>
void compute(const std::array<Product, COUNT>& products) {
  Workers& workers = Workers::shared();
  auto plans = [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Plan, COUNT>{Plan(products[I])...};
  }(std::make_index_sequence<COUNT>());
  int64_t floats = 0, items = 0;
  for (const Plan& plan : plans) {
    floats += plan.needs.total();
  }
  float* memory = scratch(floats);
  for (Plan& plan : plans) {
    memory = plan.take(memory);
    workers.run(plan.product.vectors, [&](int64_t vector, int) { plan.arrange(vector); });
    items += plan.items;
  }
  workers.run(items, [&](int64_t item, int thread) {
    size_t number = 0;
    for (; item >= plans[number].items; ++number) {
      item -= plans[number].items;
    }
    plans[number].multiply(item, thread);
  });
}

// The matrix whose weight, scales and biases are the next of the inputs.
Matrix next_matrix(const std::vector<mx::array>& inputs, size_t& next, int64_t columns, int group, int bits) {
  const mx::array& weight = inputs[next++];
  const mx::array& scales = inputs[next++];
  const mx::array& biases = inputs[next++];
  const Scales stored = scales.dtype() == mx::float32 ? Scales::float32
      : scales.dtype() == mx::float16                 ? Scales::float16
                                                      : Scales::bfloat16;
  return {
      weight.data<uint32_t>(), scales.data<void>(), biases.data<void>(), stored, weight.shape(-2), columns, group, bits};
}

class QuantizedProduct : public Operation {
 public:
  QuantizedProduct(mx::Stream stream, Product::Kind kind, bool slots, int group, int bits)
      : Operation(stream), kind_(kind), slots_(slots), group_(group), bits_(bits) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::array& out = outputs[0];
    size_t next = 0;
    Product product{};
    product.kind = kind_;
    const mx::array& x = inputs[next++];
    product.x = x.data<float>();
    if (slots_) {
      product.slots = inputs[next].data<uint32_t>();
      product.pairs = inputs[next++].size();
    }
    product.matrix = next_matrix(inputs, next, x.shape(-1), group_, bits_);
    if (kind_ == Product::Kind::gate_up) {
      product.up = next_matrix(inputs, next, x.shape(-1), group_, bits_);
    }
    product.vectors = x.size() / x.shape(-1);
    if (!slots_) {
      product.pairs = product.vectors;
    }
    product.out = out.data<float>();
    if (product.pairs == 0 || product.matrix.rows == 0) {
      return [] {};
    }
    return [product] { compute(std::array{product}); };
  }

  const char* name() const override {
    return "FlashMoEProduct";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& product = static_cast<const QuantizedProduct&>(other);
    return kind_ == product.kind_ && slots_ == product.slots_ && group_ == product.group_ && bits_ == product.bits_;
  }

 private:
  Product::Kind kind_;
  bool slots_;
  int group_;
  int bits_;
};

class AskPrimitive : public Operation {
 public:
  AskPrimitive(mx::Stream stream, Format router, Format shared) : Operation(stream), router_(router), shared_(shared) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const int64_t columns = inputs[0].shape(-1);
    Product logits{};
    logits.x = inputs[0].data<float>();
    logits.vectors = logits.pairs = inputs[0].size() / columns;
    if (logits.vectors == 0) {
      return [] {};
    }
    Product hidden = logits;
    size_t next = 1;
    logits.kind = Product::Kind::plain;
    logits.matrix = next_matrix(inputs, next, columns, router_.group, router_.bits);
    logits.out = outputs[0].data<float>();
    hidden.kind = Product::Kind::gate_up;
    hidden.matrix = next_matrix(inputs, next, columns, shared_.group, shared_.bits);
    hidden.up = next_matrix(inputs, next, columns, shared_.group, shared_.bits);
    hidden.out = outputs[1].data<float>();
    return [logits, hidden] { compute(std::array{logits, hidden}); };
  }

  const char* name() const override {
    return "FlashMoEAsk";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& ask = static_cast<const AskPrimitive&>(other);
    return router_ == ask.router_ && shared_ == ask.shared_;
  }

 private:
  Format router_, shared_;
};

void check_matrix(int columns, const Quantized& matrix, Format format, size_t ndim) {
  const auto [group, bits] = format;
  require(bits >= 2 && bits <= 8 && bits != 7, "bits must be 2, 3, 4, 5, 6 or 8");
  require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
  require(matrix.weight.dtype() == mx::uint32, "weight must be uint32");
  require(matrix.weight.ndim() == ndim && matrix.scales.ndim() == ndim, "weight and scales have too many or few axes");
  require(columns % group == 0, "columns must be a multiple of group_size");
  require(matrix.weight.shape(-1) == columns / 32 * bits, "weight does not fit x");
  require(matrix.scales.shape(-1) == columns / group, "scales do not fit x");
  require(matrix.scales.shape() == matrix.biases.shape(), "scales and biases differ in shape");
  require(matrix.scales.dtype() == matrix.biases.dtype(), "scales and biases differ in dtype");
  require(mx::issubdtype(matrix.scales.dtype(), mx::floating) && matrix.scales.dtype() != mx::float64,
      "scales must be float32, float16 or bfloat16");
  require(std::equal(matrix.weight.shape().begin(), matrix.weight.shape().end() - 1, matrix.scales.shape().begin()),
      "weight and scales differ in rows or slots");
}

void check(const mx::array& x, const Quantized& matrix, int group, int bits, size_t ndim) {
  require(x.dtype() == mx::float32 && x.ndim() >= 1, "x must be float32");
  check_matrix(x.shape(-1), matrix, {group, bits}, ndim);
}

// Whether slots are [..., top_k], with the same axes before the last as x.
void check_slots(const mx::array& slots, const mx::array& x, size_t behind) {
  require(slots.dtype() == mx::uint32, "slots must be uint32");
  require(
      slots.ndim() >= 1 && x.ndim() == slots.ndim() + behind - 1 &&
          std::equal(x.shape().begin(), x.shape().end() - 1, slots.shape().begin()),
      "x and slots do not match");
}

// [..., top_k, rows]
mx::Shape shape_of(const mx::array& slots, const mx::array& weight) {
  mx::Shape shape = slots.shape();
  shape.push_back(weight.shape(1));
  return shape;
}

mx::array make(
    Product::Kind kind, bool slots, int group, int bits, mx::Shape shape, std::vector<mx::array> inputs) {
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<QuantizedProduct>(mx::to_stream({}), kind, slots, group, bits),
      std::move(inputs));
}

}  // namespace

void check(int columns, const Quantized& matrix, Format format) {
  check_matrix(columns, matrix, format, 2);
}

mx::array linear(const mx::array& x, const Quantized& matrix, int group, int bits) {
  check(x, matrix, group, bits, 2);
  mx::Shape shape = x.shape();
  shape.back() = matrix.weight.shape(0);
  return make(Product::Kind::plain, false, group, bits, shape, {x, matrix.weight, matrix.scales, matrix.biases});
}

mx::array matvec(const mx::array& x, const mx::array& slots, const Quantized& matrix, int group, int bits) {
  check(x, matrix, group, bits, 3);
  check_slots(slots, x, 2);
  return make(
      Product::Kind::plain,
      true,
      group,
      bits,
      shape_of(slots, matrix.weight),
      {x, slots, matrix.weight, matrix.scales, matrix.biases});
}

mx::array gate_up(
    const mx::array& x, const mx::array& slots, const Quantized& gate, const Quantized& up, int group, int bits) {
  check(x, gate, group, bits, 3);
  check(x, up, group, bits, 3);
  check_slots(slots, x, 1);
  require(gate.weight.shape() == up.weight.shape(), "gate and up differ in shape");
  return make(
      Product::Kind::gate_up,
      true,
      group,
      bits,
      shape_of(slots, gate.weight),
      {x, slots, gate.weight, gate.scales, gate.biases, up.weight, up.scales, up.biases});
}

std::vector<mx::array> ask(
    const mx::array& x, const Quantized& router, Format asked, const Quantized& gate, const Quantized& up, Format shared) {
  check(x, router, asked.group, asked.bits, 2);
  check(x, gate, shared.group, shared.bits, 2);
  check(x, up, shared.group, shared.bits, 2);
  require(gate.weight.shape() == up.weight.shape(), "gate and up differ in shape");
  mx::Shape logits = x.shape(), hidden = x.shape();
  logits.back() = router.weight.shape(0);
  hidden.back() = gate.weight.shape(0);
  return mx::array::make_arrays(
      {std::move(logits), std::move(hidden)},
      {mx::float32, mx::float32},
      std::make_shared<AskPrimitive>(mx::to_stream({}), asked, shared),
      {x, router.weight, router.scales, router.biases, gate.weight, gate.scales, gate.biases, up.weight, up.scales, up.biases});
}

}  // namespace flashmoe
