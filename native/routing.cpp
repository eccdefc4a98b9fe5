#include "routing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "parallel_products.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

class RouterAndShared : public Operation {
 public:
  RouterAndShared(mx::Stream stream, Format router, Format shared)
      : Operation(stream), router_(router), shared_(shared) {}

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
    logits.matrix = next_matrix(inputs, next, router_, columns);
    logits.out = outputs[0].data<float>();
    hidden.matrix = next_matrix(inputs, next, shared_, columns);
    hidden.up = next_matrix(inputs, next, shared_, columns);
    hidden.out = outputs[1].data<float>();
    return [logits, hidden] { multiply(std::array{logits, hidden}); };
  }

  const char* name() const override {
    return "FlashMoERouterAndShared";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& each = static_cast<const RouterAndShared&>(other);
    return router_ == each.router_ && shared_ == each.shared_;
  }

 private:
  Format router_, shared_;
};

// Route one token. `gates` has room for padded(count) floats.
void choose(
    const float* logits, int64_t count, int top_k, bool normalize, float* gates, uint32_t* experts, float* scores) {
  std::copy(logits, logits + count, gates);
  const float total = kernels().softmax_numerators(gates, count, padded(count), 1.0f);
  // Insertion into a list of the best, the worst of them first. It fills up even if all gates are NaN.
  auto is_worse = [&](uint32_t a, uint32_t b) { return gates[a] < gates[b] || (gates[a] == gates[b] && a < b); };
  for (int64_t expert = 0; expert < count; ++expert) {
    const uint32_t candidate = static_cast<uint32_t>(expert);
    int k = static_cast<int>(std::min<int64_t>(expert, top_k));
    if (k == top_k) {
      if (!is_worse(experts[0], candidate)) {
        continue;
      }
      std::copy(experts + 1, experts + top_k, experts);
      --k;
    }
    for (; k > 0 && is_worse(candidate, experts[k - 1]); --k) {
      experts[k] = experts[k - 1];
    }
    experts[k] = candidate;
  }
  float chosen = 0;
  for (int k = 0; k < top_k; ++k) {
    scores[k] = gates[experts[k]] / total;
    chosen += scores[k];
  }
  for (int k = 0; normalize && k < top_k; ++k) {
    scores[k] /= chosen;
  }
  scores[top_k] = 1.0f / (1.0f + std::exp(-logits[count]));
}

class Route : public Operation {
 public:
  Route(mx::Stream stream, int top_k, bool normalize) : Operation(stream), top_k_(top_k), normalize_(normalize) {}

  Task prepare(const std::vector<mx::array>& in, std::vector<mx::array>& outputs) override {
    return [logits = in[0].data<float>(),
            size = static_cast<int64_t>(in[0].shape(-1)),
            tokens = static_cast<int64_t>(in[0].size() / in[0].shape(-1)),
            experts = outputs[0].data<uint32_t>(),
            scores = outputs[1].data<float>(),
            top_k = top_k_,
            normalize = normalize_] {
      Workers& workers = Workers::shared();
      float* const gates = scratch(workers.cores() * padded(size));
      workers.run(tokens, [&](int64_t token, int thread) {
        choose(
            logits + token * size,
            size - 1,
            top_k,
            normalize,
            gates + thread * padded(size),
            experts + token * top_k,
            scores + token * (top_k + 1));
      });
    };
  }

  const char* name() const override {
    return "FlashMoERoute";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& route = static_cast<const Route&>(other);
    return top_k_ == route.top_k_ && normalize_ == route.normalize_;
  }

 private:
  int top_k_;
  bool normalize_;
};

}  // namespace

std::vector<mx::array> router_and_shared(
    const mx::array& x,
    const Quantized& router,
    Format router_format,
    const Quantized& gate,
    const Quantized& up,
    Format shared_format) {
  check(router, router_format, x, 2);
  check(gate, shared_format, x, 2);
  check(up, shared_format, x, 2);
  require(gate.weight.shape() == up.weight.shape(), "gate and up differ in shape");
  mx::Shape logits = x.shape(), hidden = x.shape();
  logits.back() = router.weight.shape(0);
  hidden.back() = gate.weight.shape(0);
  std::vector<mx::array> inputs = {x};
  for (const Quantized* each : {&router, &gate, &up}) {
    inputs.insert(inputs.end(), {each->weight, each->scales, each->biases});
  }
  return mx::array::make_arrays(
      {std::move(logits), std::move(hidden)},
      {mx::float32, mx::float32},
      std::make_shared<RouterAndShared>(mx::to_stream({}), router_format, shared_format),
      inputs);
}

std::vector<mx::array> route(const mx::array& logits, int top_k, bool normalize) {
  require(logits.dtype() == mx::float32 && logits.ndim() >= 1, "logits must be float32 [..., experts + 1]");
  require(top_k >= 1 && top_k < logits.shape(-1), "top_k must be positive and at most the number of experts");
  mx::Shape experts = logits.shape(), scores = logits.shape();
  experts.back() = top_k;
  scores.back() = top_k + 1;
  return mx::array::make_arrays(
      {std::move(experts), std::move(scores)},
      {mx::uint32, mx::float32},
      std::make_shared<Route>(mx::to_stream({}), top_k, normalize),
      {logits});
}

}  // namespace flashmoe
