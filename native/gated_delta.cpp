#include "gated_delta.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "mlx/utils.h"
#include "operation.h"
#include "workers.h"

namespace mx = mlx::core;

namespace flashmoe {
namespace {

// Added to the sum of squares in the norms of queries and keys.
constexpr float QK_EPS = 1e-6f;
constexpr int64_t MAX_TAPS = 16;

// The arguments of one call, with the addresses of its arrays.
struct DeltaNet {
  const float *x, *window, *state, *taps, *a_log, *dt_bias, *norm;
  float *out, *next_window, *next_state;
  int64_t batch, tokens, width, channels, kernel, key_heads, value_heads, keys, values;
  DeltaLayout layout;
  float eps;
};

float softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

// The queries, keys or values of one head: their first column of x, and their first channel of the convolution.
struct Part {
  int64_t column, channel, size;
};

// Convolve a part of a token. With the last token, also copy the part into the next window, if `keep` is set.
void convolve(const DeltaNet& net, int64_t sequence, int64_t token, const Part& part, bool keep, float* out) {
  const float* inputs[MAX_TAPS];
  // Negative times are before this call.
  auto input = [&](int64_t time) {
    return time < 0 ? net.window + (sequence * (net.kernel - 1) + net.kernel - 1 + time) * net.channels + part.channel
                    : net.x + (sequence * net.tokens + time) * net.width + part.column;
  };
  for (int64_t tap = 0; tap < net.kernel; ++tap) {
    inputs[tap] = input(token + tap - (net.kernel - 1));
  }
  kernels().convolve(inputs, net.taps + part.channel * net.kernel, net.kernel, part.size, out);
  if (keep && token + 1 == net.tokens) {
    for (int64_t i = 0; i < net.kernel - 1; ++i) {
      float* const to = net.next_window + (sequence * (net.kernel - 1) + i) * net.channels + part.channel;
      std::memcpy(to, inputs[i + 1], part.size * sizeof(float));
    }
  }
}

// Run all tokens of one value head, one after the other. `memory` holds 2 * keys + values floats.
void run_head(const DeltaNet& net, int64_t sequence, int64_t head, float* memory) {
  const Kernels& kernel = kernels();
  const int64_t share = net.value_heads / net.key_heads;
  const int64_t key_head = head / share;
  const int64_t of_share = head % share;
  auto column = [&](int part) { return net.layout[part].first + key_head * net.layout[part].second; };
  const Part queries = {column(0), key_head * net.keys, net.keys};
  const Part keys = {column(1), (net.key_heads + key_head) * net.keys, net.keys};
  const Part values = {column(2) + of_share * net.values, 2 * net.key_heads * net.keys + head * net.values, net.values};
  float *const q = memory, *const k = q + net.keys, *const v = k + net.keys;
  // Queries and keys are shared by some value heads, of which the first one keeps them.
  const bool keeps_shared = of_share == 0;

  const int64_t size = net.values * net.keys;
  const float* before = net.state + (sequence * net.value_heads + head) * size;
  float* const state = net.next_state + (sequence * net.value_heads + head) * size;
  for (int64_t token = 0; token < net.tokens; ++token, before = state) {
    const int64_t row = sequence * net.tokens + token;
    const float* const x = net.x + row * net.width;
    convolve(net, sequence, token, queries, keeps_shared, q);
    convolve(net, sequence, token, keys, keeps_shared, k);
    convolve(net, sequence, token, values, true, v);
    kernel.l2_normalize(q, net.keys, QK_EPS, 1.0f / std::sqrt(static_cast<float>(net.keys)));
    kernel.l2_normalize(k, net.keys, QK_EPS, 1.0f);
    const float beta = 1.0f / (1.0f + std::exp(-x[column(4) + of_share]));
    const float decay = std::exp(-std::exp(net.a_log[head]) * softplus(x[column(5) + of_share] + net.dt_bias[head]));
    float* const out = net.out + (row * net.value_heads + head) * net.values;
    kernel.gated_delta_step(before, state, net.values, net.keys, q, k, v, decay, beta, out);
    kernel.gated_norm(out, net.norm, net.eps, x + column(3) + of_share * net.values, net.values);
  }
}

void compute(const DeltaNet& net) {
  Workers& workers = Workers::shared();
  const int64_t thread_floats = 2 * net.keys + net.values;
  float* const memory = scratch(workers.cores() * thread_floats);
  workers.run(net.batch * net.value_heads, [&](int64_t item, int thread) {
    run_head(net, item / net.value_heads, item % net.value_heads, memory + thread * thread_floats);
  });
}

class GatedDeltaNet : public Operation {
 public:
  GatedDeltaNet(mx::Stream stream, const DeltaLayout& layout, float eps)
      : Operation(stream), layout_(layout), eps_(eps) {}

  Task prepare(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    const mx::array& x = in[0];
    const mx::array& state = in[2];
    DeltaNet net{};
    const float** addresses[] = {&net.x, &net.window, &net.state, &net.taps, &net.a_log, &net.dt_bias, &net.norm};
    for (size_t i = 0; i < in.size(); ++i) {
      *addresses[i] = in[i].data<float>();
    }
    net.out = out[0].data<float>();
    net.next_window = out[1].data<float>();
    net.next_state = out[2].data<float>();
    net.batch = x.shape(0);
    net.tokens = x.shape(1);
    net.width = x.shape(2);
    net.channels = in[1].shape(2);
    net.kernel = in[3].shape(1);
    net.value_heads = state.shape(1);
    net.values = state.shape(2);
    net.keys = state.shape(3);
    net.key_heads = (net.channels - net.value_heads * net.values) / (2 * net.keys);
    net.layout = layout_;
    net.eps = eps_;
    return [net] { compute(net); };
  }

  const char* name() const override {
    return "FlashMoEGatedDeltaNet";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& net = static_cast<const GatedDeltaNet&>(other);
    return layout_ == net.layout_ && eps_ == net.eps_;
  }

 private:
  DeltaLayout layout_;
  float eps_;
};

void check(const mx::array& a, const mx::Shape& shape, const char* message) {
  require(a.shape() == shape && a.dtype() == mx::float32, message);
}

}  // namespace

std::vector<mx::array> gated_delta(
    const mx::array& x,
    const mx::array& window,
    const mx::array& state,
    const mx::array& taps,
    const mx::array& a_log,
    const mx::array& dt_bias,
    const mx::array& norm,
    const DeltaLayout& layout,
    float eps) {
  require(x.ndim() == 3 && x.size() > 0, "x must be float32 [batch, tokens, width] and must not be empty");
  require(window.ndim() == 3, "window must be float32 [batch, taps - 1, channels]");
  require(
      state.ndim() == 4 && state.size() > 0 && state.shape(3) % 16 == 0,
      "state must be float32 [batch, value_heads, values, keys] with a multiple of 16 keys");
  require(
      taps.ndim() == 3 && taps.shape(1) >= 1 && taps.shape(1) <= MAX_TAPS,
      "taps must be float32 [channels, taps, 1] with at most 16 taps");
  const int batch = x.shape(0), tokens = x.shape(1), width = x.shape(2);
  const int value_heads = state.shape(1), values = state.shape(2), keys = state.shape(3), kernel = taps.shape(1);
  const int channels = window.shape(2);
  const int key_heads = (channels - value_heads * values) / (2 * keys);
  require(
      key_heads >= 1 && value_heads % key_heads == 0 && channels == 2 * key_heads * keys + value_heads * values,
      "window must have 2 * key_heads * keys + value_heads * values channels");
  const int share = value_heads / key_heads;
  const int sizes[] = {keys, keys, share * values, share * values, share, share};
  for (size_t i = 0; i < 6; ++i) {
    const auto [first, stride] = layout[i];
    require(
        first >= 0 && stride >= 0 && first + int64_t(key_heads - 1) * stride + sizes[i] <= width,
        "the layout does not fit x");
  }
  check(x, {batch, tokens, width}, "x must be float32");
  check(window, {batch, kernel - 1, channels}, "window must be float32 [batch, taps - 1, channels]");
  check(state, {batch, value_heads, values, keys}, "state must be float32 [batch, value_heads, values, keys]");
  check(taps, {channels, kernel, 1}, "taps must be float32 [channels, taps, 1]");
  check(a_log, {value_heads}, "a_log must be float32 [value_heads]");
  check(dt_bias, {value_heads}, "dt_bias must be float32 [value_heads]");
  check(norm, {values}, "norm must be float32 [values]");
  return mx::array::make_arrays(
      {{batch, tokens, value_heads * values}, window.shape(), state.shape()},
      {mx::float32, mx::float32, mx::float32},
      std::make_shared<GatedDeltaNet>(mx::to_stream({}), layout, eps),
      {x, window, state, taps, a_log, dt_bias, norm});
}

}  // namespace flashmoe
