#include "delta.h"

#include <algorithm>
#include <cmath>
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

constexpr float QK_EPS = 1e-6f;  // added to the sum of squares

// What one call computes, with the addresses of its arrays.
struct DeltaNet {
  const float *qkv, *z, *a, *b, *recent, *state, *convolution, *a_log, *dt_bias, *norm;
  float *out, *new_recent, *new_state;
  float* convolved;  // [batch, tokens, channels]
  int64_t batch, tokens, channels, kernel, key_heads, value_heads, keys, values;
  float norm_eps;
};

float silu(float x) {
  return x / (1.0f + std::exp(-x));
}

float softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

double mean_square(const float* x, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    sum += static_cast<double>(x[i]) * x[i];
  }
  return sum / size;
}

// The input of the convolution at a time, which is negative for those before this call.
const float* input(const DeltaNet& net, int64_t sequence, int64_t time) {
  return time < 0 ? net.recent + (sequence * (net.kernel - 1) + net.kernel - 1 + time) * net.channels
                  : net.qkv + (sequence * net.tokens + time) * net.channels;
}

// One head of queries, keys or values of one token: heads are numbered in the order of the channels.
void convolve(const DeltaNet& net, int64_t sequence, int64_t token, int64_t head) {
  const bool value = head >= 2 * net.key_heads;
  const int64_t size = value ? net.values : net.keys;
  const int64_t first = value ? 2 * net.key_heads * net.keys + (head - 2 * net.key_heads) * net.values : head * net.keys;
  float* const out = net.convolved + (sequence * net.tokens + token) * net.channels + first;
  std::fill(out, out + size, 0.0f);
  for (int64_t tap = 0; tap < net.kernel; ++tap) {
    const float* const x = input(net, sequence, token + tap - (net.kernel - 1)) + first;
    const float* const weight = net.convolution + first * net.kernel + tap;
    for (int64_t i = 0; i < size; ++i) {
      out[i] += x[i] * weight[i * net.kernel];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    out[i] = silu(out[i]);
  }
  if (!value) {
    const float scale = head < net.key_heads ? 1.0f / std::sqrt(static_cast<float>(net.keys)) : 1.0f;
    const float norm = scale / std::sqrt(static_cast<float>(mean_square(out, size) * size + QK_EPS));
    for (int64_t i = 0; i < size; ++i) {
      out[i] *= norm;
    }
  }
}

// All tokens of one head of values.
void recur(const DeltaNet& net, int64_t sequence, int64_t head) {
  const int64_t key_head = head / (net.value_heads / net.key_heads);
  const int64_t size = net.values * net.keys;
  const float* before = net.state + (sequence * net.value_heads + head) * size;
  float* const state = net.new_state + (sequence * net.value_heads + head) * size;
  for (int64_t token = 0; token < net.tokens; ++token, before = state) {
    const int64_t place = sequence * net.tokens + token;
    const float* const convolved = net.convolved + place * net.channels;
    const float g = std::exp(
        -std::exp(net.a_log[head]) * softplus(net.a[place * net.value_heads + head] + net.dt_bias[head]));
    const float beta = 1.0f / (1.0f + std::exp(-net.b[place * net.value_heads + head]));
    float* const out = net.out + (place * net.value_heads + head) * net.values;
    kernels().delta_step(
        before,
        state,
        net.values,
        net.keys,
        convolved + key_head * net.keys,
        convolved + (net.key_heads + key_head) * net.keys,
        convolved + 2 * net.key_heads * net.keys + head * net.values,
        g,
        beta,
        out);
    const float* const z = net.z + (place * net.value_heads + head) * net.values;
    const float norm = 1.0f / std::sqrt(static_cast<float>(mean_square(out, net.values)) + net.norm_eps);
    for (int64_t i = 0; i < net.values; ++i) {
      out[i] *= norm * net.norm[i] * silu(z[i]);
    }
  }
}

void compute(const DeltaNet& net) {
  Workers& workers = Workers::shared();
  const int64_t heads = 2 * net.key_heads + net.value_heads;
  workers.run(net.batch * net.tokens * heads, [&](int64_t item, int) {
    convolve(net, item / heads / net.tokens, item / heads % net.tokens, item % heads);
  });
  workers.run(net.batch * net.value_heads, [&](int64_t item, int) {
    recur(net, item / net.value_heads, item % net.value_heads);
  });
  for (int64_t sequence = 0; sequence < net.batch; ++sequence) {
    for (int64_t i = 0; i < net.kernel - 1; ++i) {
      const float* const from = input(net, sequence, net.tokens - (net.kernel - 1) + i);
      std::copy(from, from + net.channels, net.new_recent + (sequence * (net.kernel - 1) + i) * net.channels);
    }
  }
}

class GatedDeltaNet : public mx::Primitive {
 public:
  GatedDeltaNet(mx::Stream stream, int key_heads, float norm_eps)
      : Primitive(stream), key_heads_(key_heads), norm_eps_(norm_eps) {}

  void eval_cpu(const std::vector<mx::array>& given, std::vector<mx::array>& out) override {
    for (mx::array& each : out) {
      each.set_data(mx::allocator::malloc(each.nbytes()));
    }
    const std::vector<mx::array> in = contiguous_inputs(given, stream());
    const mx::array& qkv = in[0];
    const mx::array& state = in[5];
    DeltaNet net{};
    const float** addresses[] = {
        &net.qkv, &net.z, &net.a, &net.b, &net.recent, &net.state, &net.convolution, &net.a_log, &net.dt_bias, &net.norm};
    for (size_t i = 0; i < in.size(); ++i) {
      *addresses[i] = in[i].data<float>();
    }
    net.out = out[0].data<float>();
    net.new_recent = out[1].data<float>();
    net.new_state = out[2].data<float>();
    net.batch = qkv.shape(0);
    net.tokens = qkv.shape(1);
    net.channels = qkv.shape(2);
    net.kernel = in[6].shape(1);
    net.key_heads = key_heads_;
    net.value_heads = state.shape(1);
    net.values = state.shape(2);
    net.keys = state.shape(3);
    net.norm_eps = norm_eps_;
    mx::array convolved(qkv.shape(), mx::float32, nullptr, {});
    convolved.set_data(mx::allocator::malloc(convolved.nbytes()));
    net.convolved = convolved.data<float>();
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.add_temporary(convolved);
    encoder.dispatch([net] { compute(net); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[flashmoe] a GatedDeltaNet of the CPU was asked of a GPU.");
  }

  const char* name() const override {
    return "FlashMoEGatedDeltaNet";
  }

 private:
  int key_heads_;
  float norm_eps_;
};

void require(const mx::array& a, const mx::Shape& shape, const char* what) {
  if (a.shape() != shape || a.dtype() != mx::float32) {
    throw std::invalid_argument(what);
  }
}

}  // namespace

std::vector<mx::array> delta_net(
    const mx::array& qkv,
    const mx::array& z,
    const mx::array& a,
    const mx::array& b,
    const mx::array& recent,
    const mx::array& state,
    const mx::array& convolution,
    const mx::array& a_log,
    const mx::array& dt_bias,
    const mx::array& norm,
    int key_heads,
    float norm_eps) {
  if (qkv.ndim() != 3 || state.ndim() != 4 || convolution.ndim() != 3 || key_heads < 1 ||
      state.shape(1) % key_heads || state.shape(3) % 16 || qkv.shape(1) == 0 || convolution.shape(1) < 1) {
    throw std::invalid_argument("these are no operands of a GatedDeltaNet whose keys are a multiple of 16");
  }
  const int batch = qkv.shape(0), tokens = qkv.shape(1);
  const int value_heads = state.shape(1), values = state.shape(2), keys = state.shape(3), kernel = convolution.shape(1);
  const int channels = 2 * key_heads * keys + value_heads * values;
  require(qkv, {batch, tokens, channels}, "qkv must be float32 [batch, tokens, channels]");
  require(z, {batch, tokens, value_heads * values}, "z must be float32 [batch, tokens, value_heads * values]");
  require(a, {batch, tokens, value_heads}, "a must be float32 [batch, tokens, value_heads]");
  require(b, {batch, tokens, value_heads}, "b must be float32 [batch, tokens, value_heads]");
  require(recent, {batch, kernel - 1, channels}, "recent must be float32 [batch, kernel - 1, channels]");
  require(state, {batch, value_heads, values, keys}, "state must be float32 [batch, value_heads, values, keys]");
  require(convolution, {channels, kernel, 1}, "convolution must be float32 [channels, kernel, 1]");
  require(a_log, {value_heads}, "a_log must be float32 [value_heads]");
  require(dt_bias, {value_heads}, "dt_bias must be float32 [value_heads]");
  require(norm, {values}, "norm must be float32 [values]");
  return mx::array::make_arrays(
      {{batch, tokens, value_heads * values}, recent.shape(), state.shape()},
      {mx::float32, mx::float32, mx::float32},
      std::make_shared<GatedDeltaNet>(mx::to_stream({}), key_heads, norm_eps),
      {qkv, z, a, b, recent, state, convolution, a_log, dt_bias, norm});
}

}  // namespace flashmoe
