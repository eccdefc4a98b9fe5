#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
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
  int64_t batch, heads, key_heads, tokens, seen, size;
  float scale;
  bool causal;
  const int32_t* position;  // if not all are seen: of the first token
  const float* gates;       // [batch, tokens, width]: each head's behind its query; or none
  int64_t width;
};

void compute(const Attention& attention) {
  const Kernels& kernel = kernels();
  // Queries that share keys: of a token all heads, then those of the next token. Some are taken at a time.
  const int64_t share = attention.heads / attention.key_heads;
  const int64_t rows = share * attention.tokens;
  const int64_t tiles = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
  const int64_t all = attention.position
      ? std::clamp<int64_t>(*attention.position + attention.tokens, attention.tokens, attention.seen)
      : attention.seen;
  Workers& workers = Workers::shared();
  const int64_t own = ATTENTION_ROWS * padded(all);  // floats of a thread
  float* const weights = scratch(workers.cores() * own);
  workers.run(attention.batch * attention.key_heads * tiles, [&](int64_t item, int thread) {
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
      seen[i] = attention.causal ? all - attention.tokens + token + 1 : all;
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
        weights + thread * own,
        padded(all),
        out);
    const int64_t count = std::min(ATTENTION_ROWS, rows - item % tiles * ATTENTION_ROWS);
    for (int64_t i = 0; attention.gates && i < count; ++i) {
      const int64_t place = (out[i] - attention.out) / attention.size;  // of the token and the head
      const float* const x = attention.gates + place / attention.heads * attention.width;
      kernel.gate(out[i], x + (2 * (place % attention.heads) + 1) * attention.size, attention.size);
    }
  });
}

class AttentionPrimitive : public Operation {
 public:
  AttentionPrimitive(mx::Stream stream, float scale, bool causal)
      : Operation(stream), scale_(scale), causal_(causal) {}

  Task prepare(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto rows = [&](size_t i) {
      const auto& strides = inputs[i].strides();
      return Rows{inputs[i].data<float>(), strides[0], strides[1], strides[2]};
    };
    Attention attention{rows(0), rows(1), rows(2)};
    attention.out = outputs[0].data<float>();
    attention.batch = inputs[0].shape(0);
    attention.heads = inputs[0].shape(1);
    attention.tokens = inputs[0].shape(2);
    attention.size = inputs[0].shape(3);
    attention.key_heads = inputs[1].shape(1);
    attention.seen = inputs[1].shape(2);
    attention.scale = scale_;
    attention.causal = causal_;
    if (inputs.size() > 3) {
      attention.position = inputs[3].data<int32_t>();
      attention.gates = inputs[4].data<float>();
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
  // Rows of a cache are read where they are.
  std::vector<mx::array> arranged(const std::vector<mx::array>& inputs) const override {
    std::vector<mx::array> arranged;
    for (const mx::array& each : inputs) {
      const bool rows = each.ndim() == 4 && each.strides().back() == 1;
      arranged.push_back(rows ? each : Operation::arranged({each})[0]);
    }
    return arranged;
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
        std::vector<float> cosines(count), sines(count);
        for (int64_t i = 0; i < count; ++i) {
          const double angle = static_cast<float>(*position + token) * frequencies[i];  // rounded as MLX does
          cosines[i] = static_cast<float>(std::cos(angle));
          sines[i] = static_cast<float>(std::sin(angle));
        }
        for (int kind = 0; kind < 2; ++kind) {
          for (int64_t head = 0; head < heads[kind]; ++head) {
            const float* const from = x + item * width + (kind ? 2 * heads[0] + head : 2 * head) * size;
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
          const float* const from = x + item * width + (2 * heads[0] + heads[1] + head) * size;
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
    if (each->ndim() != 4 || each->dtype() != mx::float32 || each->size() == 0) {
      throw std::invalid_argument("queries, keys and values must be float32 [batch, heads, tokens, size]");
    }
  }
  if (keys.shape() != values.shape() || keys.shape(0) != queries.shape(0) || keys.shape(3) != queries.shape(3) ||
      queries.shape(1) % keys.shape(1) || queries.shape(3) % 16 || (causal && keys.shape(2) < queries.shape(2))) {
    throw std::invalid_argument("these are no operands of attention whose size is a multiple of 16");
  }
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
    if (each->dtype() != mx::float32) {
      throw std::invalid_argument("x, norms and frequencies must be float32");
    }
  }
  if (x.ndim() != 3 || x.size() == 0 || heads < 1 || key_heads < 1 || size == 0 || k_norm.shape() != q_norm.shape() ||
      int64_t(size) * (2 * heads + 2 * key_heads) > x.shape(2) || 2 * frequencies.size() > size_t(size) ||
      position.size() != 1 || position.dtype() != mx::int32) {
    throw std::invalid_argument("these are no operands of norm_rope");
  }
  return mx::array::make_arrays(
      {{x.shape(0), heads, x.shape(1), size},
       {x.shape(0), key_heads, x.shape(1), size},
       {x.shape(0), key_heads, x.shape(1), size}},
      {mx::float32, mx::float32, mx::float32},
      std::make_shared<NormRope>(mx::to_stream({}), eps),
      {x, q_norm, k_norm, position, frequencies});
}

mx::array attend(
    const mx::array& queries,
    const mx::array& keys,
    const mx::array& values,
    const mx::array& position,
    const mx::array& x,
    float scale) {
  check(queries, keys, values, true);
  const int width = queries.shape(1) * queries.shape(3);
  if (x.ndim() != 3 || x.dtype() != mx::float32 || x.shape(0) != queries.shape(0) || x.shape(1) != queries.shape(2) ||
      x.shape(2) < 2 * width || position.size() != 1 || position.dtype() != mx::int32) {
    throw std::invalid_argument("x must be float32 [batch, tokens, width] and position int32 [1]");
  }
  return mx::array(
      {queries.shape(0), queries.shape(2), width},
      mx::float32,
      std::make_shared<AttentionPrimitive>(mx::to_stream({}), scale, true),
      {queries, keys, values, position, x});
}

}  // namespace flashmoe
