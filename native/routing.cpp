#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// One token's; `gates` is room for padded(count) floats.
void choose(
    const float* logits, int64_t count, int top_k, bool normalize, float* gates, uint32_t* experts, float* scores) {
  std::copy(logits, logits + count, gates);
  const float total = kernels().soften(gates, count, padded(count), 1.0f);
  // The best so far, the worst of them first. There are enough even if none of the gates is a number.
  auto worse = [&](uint32_t a, uint32_t b) { return gates[a] < gates[b] || (gates[a] == gates[b] && a < b); };
  for (int64_t expert = 0; expert < count; ++expert) {
    const uint32_t next = static_cast<uint32_t>(expert);
    int place = static_cast<int>(std::min<int64_t>(expert, top_k));
    if (place == top_k) {
      if (!worse(experts[0], next)) {
        continue;
      }
      std::copy(experts + 1, experts + top_k, experts);
      --place;
    }
    for (; place > 0 && worse(next, experts[place - 1]); --place) {
      experts[place] = experts[place - 1];
    }
    experts[place] = next;
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

std::vector<mx::array> route(const mx::array& logits, int top_k, bool normalize) {
  if (logits.dtype() != mx::float32 || logits.ndim() < 1 || top_k < 1 || logits.shape(-1) <= top_k) {
    throw std::invalid_argument("logits must be float32 [..., experts + 1] of at least top_k experts");
  }
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
