#include "products.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "inputs.h"
#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// What one call computes, with the addresses of its arrays.
struct Product {
  enum class Kind { plain, gate_up, down };

  Kind kind;
  Matrix matrix;               // the first of the slots
  Matrix up;                   // for gate_up
  const uint32_t* slots;       // [pairs]; none if there is one matrix
  const float* scores;         // [pairs], for down
  const float* x;              // [vectors, columns]
  int64_t vectors;
  int64_t pairs;               // of a vector and a slot; as many pairs in a row share a vector as there are per vector
  float* out;                  // [pairs, rows], or [tokens, rows] for down
  int64_t tokens;              // for down
  float* memory;               // as much as needs() says
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
  int64_t vectors, scratch, up, pairs;  // floats

  explicit Needs(const Product& product) {
    const Layout layout = kernels().layout(product.matrix);
    vectors = product.vectors * layout.arranged;
    scratch = (layout.scratch + 15) / 16 * 16;
    up = product.kind == Product::Kind::gate_up ? BATCH * MOST_CHUNK : 0;
    pairs = product.kind == Product::Kind::down ? product.pairs * product.matrix.rows : 0;
  }

  int64_t total() const {
    return 16 + vectors + Workers::shared().cores() * (scratch + up) + pairs;
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

float silu(float x) {
  return x / (1.0f + std::exp(-x));
}

void compute(const Product& product) {
  Workers& workers = Workers::shared();
  const Kernels& kernel = kernels();
  const Needs needs(product);
  const int64_t arranged = kernel.layout(product.matrix).arranged;
  const int64_t rows = product.matrix.rows;
  const int64_t share = product.pairs / product.vectors;
  float* memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(product.memory) + 63) & ~uintptr_t(63));
  float* const vectors = memory;
  float* const scratch = vectors + needs.vectors;
  float* const results = needs.pairs ? scratch + workers.cores() * (needs.scratch + needs.up) : product.out;

  workers.run(product.vectors, [&](int64_t vector, int) {
    kernel.arrange(product.matrix, product.x + vector * product.matrix.columns, vectors + vector * arranged);
  });

  // Pairs in the order of their slots: those of a slot are multiplied together.
  std::vector<int64_t> order(product.pairs);
  std::iota(order.begin(), order.end(), 0);
  std::vector<int64_t> begins = {0};  // of each slot's pairs
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

  const int64_t chunk = chunk_rows(product, groups);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  workers.run(groups * chunks, [&](int64_t item, int thread) {
    const int64_t group = item / chunks;
    const int64_t begin = item % chunks * chunk;
    const int64_t end = std::min(rows, begin + chunk);
    const int64_t slot = product.slots ? product.slots[order[begins[group]]] : 0;
    if (slot == NO_SLOT) {
      for (int64_t pair = begins[group]; pair < begins[group + 1]; ++pair) {
        std::fill_n(results + order[pair] * rows + begin, end - begin, 0.0f);
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
        out[i] = results + order[first + i] * rows + begin;
        up[i] = own + needs.scratch + i * MOST_CHUNK;
      }
      kernel.multiply(in_slot(product.matrix, slot), begin, end, x, out, count, own);
      if (product.kind == Product::Kind::gate_up) {
        kernel.multiply(in_slot(product.up, slot), begin, end, x, up, count, own);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t row = 0; row < end - begin; ++row) {
            out[i][row] = silu(out[i][row]) * up[i][row];
          }
        }
      }
    }
  });

  if (product.kind == Product::Kind::down) {
    const int64_t top_k = product.pairs / product.tokens;
    for (int64_t token = 0; token < product.tokens; ++token) {
      float* const out = product.out + token * rows;
      std::fill(out, out + rows, 0.0f);
      for (int64_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
        for (int64_t row = 0; row < rows; ++row) {
          out[row] += product.scores[pair] * results[pair * rows + row];
        }
      }
    }
  }
}

class QuantizedProduct : public mx::Primitive {
 public:
  QuantizedProduct(mx::Stream stream, Product::Kind kind, bool slots, int group, int bits)
      : Primitive(stream), kind_(kind), slots_(slots), group_(group), bits_(bits) {}

  void eval_cpu(const std::vector<mx::array>& given, std::vector<mx::array>& outputs) override {
    mx::array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const std::vector<mx::array> inputs = contiguous_inputs(given, stream());
    size_t next = 0;
    Product product{};
    product.kind = kind_;
    const mx::array& x = inputs[next++];
    product.x = x.data<float>();
    if (slots_) {
      product.slots = inputs[next].data<uint32_t>();
      product.pairs = inputs[next++].size();
    }
    if (kind_ == Product::Kind::down) {
      product.scores = inputs[next++].data<float>();
    }
    product.matrix = matrix(inputs, next, x.shape(-1));
    if (kind_ == Product::Kind::gate_up) {
      product.up = matrix(inputs, next, x.shape(-1));
    }
    product.vectors = x.size() / x.shape(-1);
    if (!slots_) {
      product.pairs = product.vectors;
    }
    product.out = out.data<float>();
    product.tokens = out.size() / product.matrix.rows;
    if (product.pairs == 0 || product.matrix.rows == 0) {
      return;
    }
    const int64_t nbytes = Needs(product).total() * sizeof(float);
    mx::array memory({static_cast<int>(nbytes)}, mx::uint8, nullptr, {});
    memory.set_data(mx::allocator::malloc(nbytes));
    product.memory = reinterpret_cast<float*>(memory.data<uint8_t>());
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.add_temporary(memory);
    encoder.dispatch([product] { compute(product); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[flashmoe] products of the CPU were asked of a GPU.");
  }

  const char* name() const override {
    return "FlashMoEProduct";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& product = static_cast<const QuantizedProduct&>(other);
    return kind_ == product.kind_ && slots_ == product.slots_ && group_ == product.group_ && bits_ == product.bits_;
  }

 private:
  Matrix matrix(const std::vector<mx::array>& inputs, size_t& next, int64_t columns) const {
    const mx::array& weight = inputs[next++];
    const mx::array& scales = inputs[next++];
    const mx::array& biases = inputs[next++];
    const Scales stored = scales.dtype() == mx::float32 ? Scales::float32
        : scales.dtype() == mx::float16                 ? Scales::float16
                                                        : Scales::bfloat16;
    return {
        weight.data<uint32_t>(),
        scales.data<void>(),
        biases.data<void>(),
        stored,
        weight.shape(-2),
        columns,
        group_,
        bits_};
  }

  Product::Kind kind_;
  bool slots_;
  int group_;
  int bits_;
};

void require(bool condition, const char* what) {
  if (!condition) {
    throw std::invalid_argument(what);
  }
}

void check(const mx::array& x, const Quantized& matrix, int group, int bits, size_t ndim) {
  const int columns = x.shape(-1);
  require(bits >= 2 && bits <= 8 && bits != 7, "bits must be 2, 3, 4, 5, 6 or 8");
  require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
  require(x.dtype() == mx::float32, "x must be float32");
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

void check_slots(const mx::array& slots) {
  require(slots.dtype() == mx::uint32, "slots must be uint32");
  require(slots.ndim() == 2, "slots must be [tokens, top_k]");
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

mx::array linear(const mx::array& x, const Quantized& matrix, int group, int bits) {
  check(x, matrix, group, bits, 2);
  mx::Shape shape = x.shape();
  shape.back() = matrix.weight.shape(0);
  return make(Product::Kind::plain, false, group, bits, shape, {x, matrix.weight, matrix.scales, matrix.biases});
}

mx::array matvec(const mx::array& x, const mx::array& slots, const Quantized& matrix, int group, int bits) {
  check(x, matrix, group, bits, 3);
  check_slots(slots);
  require(x.ndim() == 3 && x.shape(0) == slots.shape(0) && x.shape(1) == slots.shape(1), "x and slots do not match");
  return make(
      Product::Kind::plain,
      true,
      group,
      bits,
      {slots.shape(0), slots.shape(1), matrix.weight.shape(1)},
      {x, slots, matrix.weight, matrix.scales, matrix.biases});
}

mx::array gate_up(
    const mx::array& x, const mx::array& slots, const Quantized& gate, const Quantized& up, int group, int bits) {
  check(x, gate, group, bits, 3);
  check(x, up, group, bits, 3);
  check_slots(slots);
  require(x.ndim() == 2 && x.shape(0) == slots.shape(0), "x and slots do not match");
  require(gate.weight.shape() == up.weight.shape(), "gate and up differ in shape");
  return make(
      Product::Kind::gate_up,
      true,
      group,
      bits,
      {slots.shape(0), slots.shape(1), gate.weight.shape(1)},
      {x, slots, gate.weight, gate.scales, gate.biases, up.weight, up.scales, up.biases});
}

mx::array down(
    const mx::array& x,
    const mx::array& slots,
    const mx::array& scores,
    const Quantized& matrix,
    int group,
    int bits) {
  check(x, matrix, group, bits, 3);
  check_slots(slots);
  require(x.ndim() == 3 && x.shape(0) == slots.shape(0) && x.shape(1) == slots.shape(1), "x and slots do not match");
  require(scores.shape() == slots.shape() && scores.dtype() == mx::float32, "scores must be float32, one a slot");
  return make(
      Product::Kind::down,
      true,
      group,
      bits,
      {slots.shape(0), matrix.weight.shape(1)},
      {x, slots, scores, matrix.weight, matrix.scales, matrix.biases});
}

}  // namespace flashmoe
