#include "attention.h"

#include <algorithm>
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

// Where the rows [batch, heads, tokens] of an array begin.
struct Rows {
  const float* first;
  int64_t batch, head, token;  // strides

  const float* at(int64_t b, int64_t h, int64_t t) const {
    return first + b * batch + h * head + t * token;
  }
};

// What one call computes, with the addresses of its arrays.
struct Attention {
  Rows queries, keys, values;
  float* out;      // [batch, tokens, heads, size]
  float* weights;  // [cores, ATTENTION_ROWS, padded(seen)]
  int64_t batch, heads, key_heads, tokens, seen, size;
  float scale;
  bool causal;
};

int64_t padded(int64_t seen) {
  return (seen + 15) / 16 * 16;
}

void compute(const Attention& attention) {
  const Kernels& kernel = kernels();
  // Queries that share keys: of a token all heads, then those of the next token. Some are taken at a time.
  const int64_t share = attention.heads / attention.key_heads;
  const int64_t rows = share * attention.tokens;
  const int64_t tiles = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
  Workers::shared().run(attention.batch * attention.key_heads * tiles, [&](int64_t item, int thread) {
    const int64_t b = item / tiles / attention.key_heads;
    const int64_t key_head = item / tiles % attention.key_heads;
    const float* queries[ATTENTION_ROWS];
    float* out[ATTENTION_ROWS];
    int64_t seen[ATTENTION_ROWS];
    for (int64_t i = 0; i < ATTENTION_ROWS; ++i) {
      const int64_t row = std::min(item % tiles * ATTENTION_ROWS + i, rows - 1);
      const int64_t token = row / share;
      const int64_t head = key_head * share + row % share;
      queries[i] = attention.queries.at(b, head, token);
      out[i] = attention.out + ((b * attention.tokens + token) * attention.heads + head) * attention.size;
      seen[i] = attention.causal ? attention.seen - attention.tokens + token + 1 : attention.seen;
    }
    kernel.attend(
        queries,
        attention.keys.at(b, key_head, 0),
        attention.keys.token,
        attention.values.at(b, key_head, 0),
        attention.values.token,
        seen,
        attention.size,
        attention.scale,
        attention.weights + thread * ATTENTION_ROWS * padded(attention.seen),
        padded(attention.seen),
        out);
  });
}

class AttentionPrimitive : public mx::UnaryPrimitive {
 public:
  AttentionPrimitive(mx::Stream stream, float scale, bool causal)
      : UnaryPrimitive(stream), scale_(scale), causal_(causal) {}

  void eval_cpu(const std::vector<mx::array>& given, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    std::vector<mx::array> inputs;  // rows of a cache are read where they are
    for (const mx::array& each : given) {
      inputs.push_back(each.strides().back() == 1 ? each : contiguous_inputs({each}, stream())[0]);
    }
    auto rows = [&](size_t i) {
      const auto& strides = inputs[i].strides();
      return Rows{inputs[i].data<float>(), strides[0], strides[1], strides[2]};
    };
    Attention attention{rows(0), rows(1), rows(2)};
    attention.out = out.data<float>();
    attention.batch = inputs[0].shape(0);
    attention.heads = inputs[0].shape(1);
    attention.tokens = inputs[0].shape(2);
    attention.size = inputs[0].shape(3);
    attention.key_heads = inputs[1].shape(1);
    attention.seen = inputs[1].shape(2);
    attention.scale = scale_;
    attention.causal = causal_;
    const int64_t floats = Workers::shared().cores() * ATTENTION_ROWS * padded(attention.seen);
    mx::array weights({static_cast<int>(floats)}, mx::float32, nullptr, {});
    weights.set_data(mx::allocator::malloc(weights.nbytes()));
    attention.weights = weights.data<float>();
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.add_temporary(weights);
    encoder.dispatch([attention] { compute(attention); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[flashmoe] attention of the CPU was asked of a GPU.");
  }

  const char* name() const override {
    return "FlashMoEAttention";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& attention = static_cast<const AttentionPrimitive&>(other);
    return scale_ == attention.scale_ && causal_ == attention.causal_;
  }

 private:
  float scale_;
  bool causal_;
};

}  // namespace

mx::array attention(
    const mx::array& queries, const mx::array& keys, const mx::array& values, float scale, bool causal) {
  for (const mx::array* each : {&queries, &keys, &values}) {
    if (each->ndim() != 4 || each->dtype() != mx::float32 || each->size() == 0) {
      throw std::invalid_argument("queries, keys and values must be float32 [batch, heads, tokens, size]");
    }
  }
  if (keys.shape() != values.shape() || keys.shape(0) != queries.shape(0) || keys.shape(3) != queries.shape(3) ||
      queries.shape(1) % keys.shape(1) || queries.shape(3) % 16 || (causal && keys.shape(2) < queries.shape(2))) {
    throw std::invalid_argument("these are no operands of attention whose size is a multiple of 16");
  }
  return mx::array(
      {queries.shape(0), queries.shape(2), queries.shape(1), queries.shape(3)},
      mx::float32,
      std::make_shared<AttentionPrimitive>(mx::to_stream({}), scale, causal),
      {queries, keys, values});
}

}  // namespace flashmoe
