#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// An array [batch, heads, tokens, size] whose rows are contiguous.
struct Rows {
  const float* first;
  int64_t batch_stride, head_stride, token_stride;

  explicit Rows(const mx::array& a)
      : first(a.data<float>()),
        batch_stride(a.strides()[0]),
        head_stride(a.strides()[1]),
        token_stride(a.strides()[2]) {}

  const float* at(int64_t batch, int64_t head, int64_t token) const {
    return first + batch * batch_stride + head * head_stride + token * token_stride;
  }
};

// The arguments of one call, with the addresses of its arrays.
struct Attention {
  Rows queries, keys, values;
  float* out;  // [batch, tokens, heads, size]
  int64_t batch, heads, key_heads, tokens, seen, size;
  float scale;
  bool causal;

  // For decode_attention() only: the position of the first token, and the projections, which have the gates.
  const int32_t* position;
  const float* x;  // [batch, tokens, width]
  int64_t width;
};

void compute(const Attention& attention) {
  const Kernels& kernel = kernels();
  // Rows are the queries that share a key head: all heads of a token, then those of the next token. A tile has
  // ATTENTION_ROWS of them.
  const int64_t share = attention.heads / attention.key_heads;
  const int64_t rows = share * attention.tokens;
  const int64_t tiles = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
  const int64_t length = attention.position
      ? std::clamp<int64_t>(*attention.position + attention.tokens, attention.tokens, attention.seen)
      : attention.seen;
  Workers& workers = Workers::shared();
  const int64_t thread_floats = ATTENTION_ROWS * padded(length);
  float* const weights = scratch(workers.cores() * thread_floats);
  workers.run(attention.batch * attention.key_heads * tiles, [&](int64_t item, int thread) {
    const int64_t batch = item / tiles / attention.key_heads;
    const int64_t key_head = item / tiles % attention.key_heads;
    const int64_t first = item % tiles * ATTENTION_ROWS;
    const float* queries[ATTENTION_ROWS];
    float* out[ATTENTION_ROWS];
    int64_t seen[ATTENTION_ROWS];
    // A tile that lacks rows repeats the last one.
    for (int64_t i = 0; i < ATTENTION_ROWS; ++i) {
      const int64_t row = std::min(first + i, rows - 1);
      const int64_t token = row / share;
      const int64_t head = key_head * share + row % share;
      queries[i] = attention.queries.at(batch, head, token);
      out[i] = attention.out + ((batch * attention.tokens + token) * attention.heads + head) * attention.size;
      seen[i] = attention.causal ? length - attention.tokens + token + 1 : length;
    }
    kernel.attention(
        queries,
        attention.keys.at(batch, key_head, 0),
        attention.keys.token_stride,
        attention.values.at(batch, key_head, 0),
        attention.values.token_stride,
        seen,
        attention.size,
        attention.scale,
        weights + thread * thread_floats,
        padded(length),
        out);
    const int64_t count = std::min(ATTENTION_ROWS, rows - first);
    for (int64_t i = 0; attention.x && i < count; ++i) {
      const int64_t token_and_head = (out[i] - attention.out) / attention.size;
      const int64_t token = token_and_head / attention.heads, head = token_and_head % attention.heads;
      const float* const gate = attention.x + token * attention.width + (2 * head + 1) * attention.size;
      kernel.sigmoid_gate(out[i], gate, attention.size);
    }
  });
}

class AttentionPrimitive : public Operation {
 public:
  AttentionPrimitive(mx::Stream stream, float scale, bool causal) : Operation(stream), scale_(scale), causal_(causal) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array& queries = inputs[0];
    const mx::array& keys = inputs[1];
    Attention attention{
        .queries = Rows(queries),
        .keys = Rows(keys),
        .values = Rows(inputs[2]),
        .out = outputs[0].data<float>(),
        .batch = queries.shape(0),
        .heads = queries.shape(1),
        .key_heads = keys.shape(1),
        .tokens = queries.shape(2),
        .seen = keys.shape(2),
        .size = queries.shape(3),
        .scale = scale_,
        .causal = causal_,
        .position = nullptr,
        .x = nullptr,
        .width = 0,
    };
    if (inputs.size() > 3) {
      attention.position = inputs[3].data<int32_t>();
      attention.x = inputs[4].data<float>();
      attention.width = inputs[4].shape(-1);
    }
    return [attention] { compute(attention); };
  }

  const char* name() const override {
    return "FlashMoEAttention";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& attention = static_cast<const AttentionPrimitive&>(other);
    return scale_ == attention.scale_ && causal_ == attention.causal_;
  }

 protected:
  // Keys and values are slices of a cache: zero-copy as long as their rows are contiguous.
  std::vector<mx::array> readable(const std::vector<mx::array>& inputs) const override {
    std::vector<mx::array> readable;
    for (const mx::array& each : inputs) {
      const bool has_rows = each.ndim() == 4 && each.strides().back() == 1;
      readable.push_back(has_rows ? each : Operation::readable({each})[0]);
    }
    return readable;
  }

 private:
  float scale_;
  bool causal_;
};

class NormRope : public Operation {
 public:
  NormRope(mx::Stream stream, float eps) : Operation(stream), eps_(eps) {}

  Task prepare(const std::vector<mx::array>& in, std::vector<mx::array>& outputs) override {
    return [x = in[0].data<float>(),
            norms = std::array{in[1].data<float>(), in[2].data<float>()},
            position = in[3].data<int32_t>(),
            frequencies = in[4].data<float>(),
            count = static_cast<int64_t>(in[4].size()),
            to = std::array{outputs[0].data<float>(), outputs[1].data<float>(), outputs[2].data<float>()},
            heads = std::array<int64_t, 3>{outputs[0].shape(1), outputs[1].shape(1), outputs[2].shape(1)},
            batch = in[0].shape(0),
            tokens = static_cast<int64_t>(in[0].shape(1)),
            width = static_cast<int64_t>(in[0].shape(2)),
            size = static_cast<int64_t>(in[1].size()),
            eps = eps_] {
      const Kernels& kernel = kernels();
      Workers::shared().run(batch * tokens, [&](int64_t item, int) {
        const int64_t sequence = item / tokens, token = item % tokens;
        const float* const row = x + item * width;
        std::vector<float> cosines(count), sines(count);
        for (int64_t i = 0; i < count; ++i) {
          // The product is rounded to float32 as in MLX, so that both rotate by the same angle.
          const double angle = static_cast<float>(*position + token) * frequencies[i];
          cosines[i] = static_cast<float>(std::cos(angle));
          sines[i] = static_cast<float>(std::sin(angle));
        }
        // Queries, which have gates between them, then keys.
        for (int kind = 0; kind < 2; ++kind) {
          for (int64_t head = 0; head < heads[kind]; ++head) {
            const float* const from = row + (kind ? 2 * heads[0] + head : 2 * head) * size;
            float* const out = to[kind] + ((sequence * heads[kind] + head) * tokens + token) * size;
            kernel.norm(from, nullptr, norms[kind], eps, size, nullptr, out);
            for (int64_t i = 0; i < count; ++i) {
              const float a = out[i], b = out[i + count];
              out[i] = a * cosines[i] - b * sines[i];
              out[i + count] = a * sines[i] + b * cosines[i];
            }
          }
        }
        for (int64_t head = 0; head < heads[2]; ++head) {
          const float* const from = row + (2 * heads[0] + heads[1] + head) * size;
          std::copy_n(from, size, to[2] + ((sequence * heads[2] + head) * tokens + token) * size);
        }
      });
    };
  }

  const char* name() const override {
    return "FlashMoENormRope";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const NormRope&>(other).eps_;
  }

 private:
  float eps_;
};

void check(const mx::array& queries, const mx::array& keys, const mx::array& values, bool causal) {
  for (const mx::array* each : {&queries, &keys, &values}) {
    require(
        each->ndim() == 4 && each->dtype() == mx::float32 && each->size() > 0,
        "queries, keys and values must be float32 [batch, heads, tokens, size] and must not be empty");
  }
  require(keys.shape() == values.shape(), "keys and values differ in shape");
  require(
      keys.shape(0) == queries.shape(0) && keys.shape(3) == queries.shape(3),
      "queries and keys differ in batch or head size");
  require(queries.shape(1) % keys.shape(1) == 0, "heads must be a multiple of key heads");
  require(queries.shape(3) % 16 == 0, "the head size must be a multiple of 16");
  require(!causal || keys.shape(2) >= queries.shape(2), "causal attention needs a key for each query");
}

void check_position(const mx::array& position) {
  require(position.size() == 1 && position.dtype() == mx::int32, "position must be int32 [1]");
}

}  // namespace

mx::array attention(
    const mx::array& queries, const mx::array& keys, const mx::array& values, float scale, bool causal) {
  check(queries, keys, values, causal);
  return mx::array(
      {queries.shape(0), queries.shape(2), queries.shape(1), queries.shape(3)},
      mx::float32,
      std::make_shared<AttentionPrimitive>(mx::to_stream({}), scale, causal),
      {queries, keys, values});
}

std::vector<mx::array> norm_rope(
    const mx::array& x,
    const mx::array& q_norm,
    const mx::array& k_norm,
    const mx::array& position,
    const mx::array& frequencies,
    int heads,
    int key_heads,
    float eps) {
  const int size = q_norm.size();
  for (const mx::array* each : {&x, &q_norm, &k_norm, &frequencies}) {
    require(each->dtype() == mx::float32, "x, norms and frequencies must be float32");
  }
  require(x.ndim() == 3 && x.size() > 0, "x must be [batch, tokens, width] and must not be empty");
  require(size > 0 && k_norm.shape() == q_norm.shape(), "the norms of queries and keys must be [size]");
  require(
      heads >= 1 && key_heads >= 1 && int64_t(size) * (2 * heads + 2 * key_heads) <= x.shape(2),
      "x is too narrow for the queries, gates, keys and values of these heads");
  require(2 * frequencies.size() <= size_t(size), "there must be at most size / 2 frequencies");
  check_position(position);
  return mx::array::make_arrays(
      {{x.shape(0), heads, x.shape(1), size},
       {x.shape(0), key_heads, x.shape(1), size},
       {x.shape(0), key_heads, x.shape(1), size}},
      {mx::float32, mx::float32, mx::float32},
      std::make_shared<NormRope>(mx::to_stream({}), eps),
      {x, q_norm, k_norm, position, frequencies});
}

mx::array decode_attention(
    const mx::array& queries,
    const mx::array& keys,
    const mx::array& values,
    const mx::array& position,
    const mx::array& x,
    float scale) {
  check(queries, keys, values, true);
  check_position(position);
  const int width = queries.shape(1) * queries.shape(3);
  require(
      x.ndim() == 3 && x.dtype() == mx::float32 && x.shape(0) == queries.shape(0) && x.shape(1) == queries.shape(2) &&
          x.shape(2) >= 2 * width,
      "x must be float32 [batch, tokens, width] with a query and a gate for each head");
  return mx::array(
      {queries.shape(0), queries.shape(2), width},
      mx::float32,
      std::make_shared<AttentionPrimitive>(mx::to_stream({}), scale, true),
      {queries, keys, values, position, x});
}

}  // namespace flashmoe
