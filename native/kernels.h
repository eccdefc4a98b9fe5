// What a kernel of one instruction set offers to the primitives. kernels.cpp is compiled once for each set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe {

enum class Scales { float32, float16, bfloat16 };  // how scales and biases are stored

// One matrix in MLX's affine quantisation: weight = scale * q + bias, for each group of a row's elements.
struct Matrix {
  const uint32_t* weight;  // [rows, columns * bits / 32]
  const void* scales;      // [rows, columns / group]
  const void* biases;
  Scales stored;
  int64_t rows;
  int64_t columns;
  int group;
  int bits;
};

constexpr int64_t MOST_CHUNK = 256;    // rows that are multiplied in one call
constexpr int64_t ATTENTION_ROWS = 8;  // queries that meet the same keys in one call

// Where vectors lie: how many floats each takes once it is arranged, and what the scales of a chunk take besides.
struct Layout {
  int64_t arranged;
  int64_t scratch;
};

struct Kernels {
  const char* name;

  Layout (*layout)(const Matrix& matrix);

  // Put a vector in the order in which weights are unpacked, and the sums of its groups behind it.
  void (*arrange)(const Matrix& matrix, const float* x, float* arranged);

  // out[t][row - begin] = matrix[row] x[t], for rows from begin to end and arranged vectors x. What comes out depends on
  // the row and the vector only, not on which are computed together.
  void (*multiply)(
      const Matrix& matrix,
      int64_t begin,
      int64_t end,
      const float* const* x,
      float* const* out,
      int64_t vectors,
      float* scratch);

  // sum = x + y and its root mean square norm: sum / sqrt(mean(sum^2) + eps) * weight. Without y it is x that is normed.
  void (*norm)(
      const float* x, const float* y, const float* weight, float eps, int64_t size, float* sum, float* normed);

  // The end of a layer of experts: out = x + sum over k of scores[k] * y[k] + scores[count] * shared.
  void (*combine)(
      const float* x,
      const float* y,  // [count][size]
      const float* scores,
      int64_t count,
      const float* shared,
      int64_t size,
      float* out);

  // In place exp(scale * (x - max(x))), and zeros behind it until `end`, a multiple of 16. Returns the sum.
  float (*soften)(float* x, int64_t size, int64_t end, float scale);

  // silu of a convolution over time: of as many inputs as there are taps, each [size], and weights [size][taps].
  void (*convolve)(const float* const* inputs, const float* weights, int64_t taps, int64_t size, float* out);

  // In place x / sqrt(sum(x^2) + eps) * scale.
  void (*normalize)(float* x, int64_t size, float eps, float scale);

  // In place the root mean square norm times silu(gate).
  void (*gated_norm)(float* x, const float* weight, float eps, const float* gate, int64_t size);

  // In place x * sigmoid(gate).
  void (*gate)(float* x, const float* gate, int64_t size);

  // out = silu(out) * up.
  void (*swiglu)(float* out, const float* up, int64_t size);

  // One step of the gated delta rule for one head: the state, [values, keys], decays by g, forgets what it would recall
  // for k and learns v for it, by beta; out is what it recalls for q. `before` may be `state` itself.
  void (*delta_step)(
      const float* before,
      float* state,
      int64_t values,
      int64_t keys,  // a multiple of 16
      const float* q,
      const float* k,
      const float* v,
      float g,
      float beta,
      float* out);

  // Attention of some queries, of which each sees the first so many keys: out[row] is the mean of the values, weighted
  // with exp(scale * query key). What comes out depends on the row only, not on which are computed together.
  void (*attend)(
      const float* const* queries,  // [ATTENTION_ROWS][size]
      const float* keys,
      int64_t key_stride,
      const float* values,
      int64_t value_stride,
      const int64_t* seen,
      int64_t size,  // a multiple of 16
      float scale,
      float* weights,  // [ATTENTION_ROWS][stride]: room for the seen keys, padded to a multiple of 16
      int64_t stride,
      float* const* out);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// Those of the best instruction set that this CPU has, or of the one that was chosen.
const Kernels& kernels();

// Use a certain set from now on, for tests: nothing may be under way. False if this CPU does not have it.
bool choose_kernels(const char* name);

}  // namespace flashmoe
