// The inner loops that operations call: one table of functions for each instruction set, made by kernels.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe {

// The dtype in which scales and biases are stored.
enum class Scales { float32, float16, bfloat16 };

// One matrix in MLX's affine quantization: weight = scale * q + bias for each group of a row's elements.
struct Matrix {
  const uint32_t* weight;  // [rows, columns * bits / 32]
  const void* scales;      // [rows, columns / group]
  const void* biases;      // [rows, columns / group]
  Scales stored;
  int64_t rows;
  int64_t columns;
  int group;
  int bits;
};

// The most rows that multiply() takes in a call.
constexpr int64_t MAX_CHUNK_ROWS = 256;

// The queries that attention() takes in a call.
constexpr int64_t ATTENTION_ROWS = 8;

// Memory that products with a matrix need, in floats: for each packed vector, and for each thread.
struct BufferSizes {
  int64_t packed_vector;
  int64_t scratch;
};

// All arrays are contiguous float32 unless a comment says otherwise.
struct Kernels {
  const char* name;

  BufferSizes (*buffer_sizes)(const Matrix& matrix);

  // Permute a vector into the order in which weights are unpacked, and append the sums of its groups.
  void (*pack_vector)(const Matrix& matrix, const float* x, float* packed);

  // out[t][row - begin] = matrix[row] x[t] for rows from begin to end and packed vectors x. The bits of a result depend
  // on its row and its vector only, not on the others in the call.
  void (*multiply)(
      const Matrix& matrix,
      int64_t begin,
      int64_t end,
      const float* const* x,
      float* const* out,
      int64_t vectors,
      float* scratch);

  // out = silu(out) * up.
  void (*swiglu)(float* out, const float* up, int64_t size);

  // sum = x + y and normed = sum / sqrt(mean(sum^2) + eps) * weight. If y is null, x is normed and sum is not written.
  void (*norm)(const float* x, const float* y, const float* weight, float eps, int64_t size, float* sum, float* normed);

  // The end of a layer of experts: out = x + sum over k of scores[k] * y[k] + scores[count] * shared.
  void (*combine)(
      const float* x,
      const float* y,       // [count, size]
      const float* scores,  // [count + 1]
      int64_t count,
      const float* shared,
      int64_t size,
      float* out);

  // Replace x by exp(scale * (x - max(x))) and return the sum, the denominator of the softmax. Zeros follow from `size`
  // to `end`, a multiple of 16.
  float (*softmax_numerators)(float* x, int64_t size, int64_t end, float scale);

  // SiLU of a depthwise convolution over time, at one token.
  void (*convolve)(
      const float* const* inputs,  // [taps][size]
      const float* weights,        // [size, taps]
      int64_t taps,
      int64_t size,
      float* out);

  // In place: x / sqrt(sum(x^2) + eps) * scale.
  void (*l2_normalize)(float* x, int64_t size, float eps, float scale);

  // One token of the gated delta rule, for the state S of one head:
  //
  //     S = decay * before;   S += beta * (v - S k) k^T;   out = S q
  //
  // `before` may be `state` itself.
  void (*gated_delta_step)(
      const float* before,  // [values, keys]
      float* state,         // [values, keys]
      int64_t values,
      int64_t keys,    // a multiple of 16
      const float* q,  // [keys]
      const float* k,  // [keys]
      const float* v,  // [values]
      float decay,
      float beta,
      float* out);  // [values]

  // In place: the RMS norm of x, times silu(gate).
  void (*gated_norm)(float* x, const float* weight, float eps, const float* gate, int64_t size);

  // out[row] = softmax(scale * queries[row] keys^T) values, over the first seen[row] keys. `weights` is scratch memory,
  // whose rows hold the largest of `seen`, rounded up to a multiple of 16. The bits of a row do not depend on the
  // others.
  void (*attention)(
      const float* const* queries,  // [ATTENTION_ROWS][size]
      const float* keys,
      int64_t key_stride,
      const float* values,
      int64_t value_stride,
      const int64_t* seen,  // [ATTENTION_ROWS]
      int64_t size,         // a multiple of 16
      float scale,
      float* weights,  // [ATTENTION_ROWS, stride]
      int64_t stride,
      float* const* out);

  // In place: x * sigmoid(gate).
  void (*sigmoid_gate)(float* x, const float* gate, int64_t size);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The kernels of the best instruction set that this CPU supports, or of the one that was chosen.
const Kernels& kernels();

// Use one instruction set from now on, for tests. Returns false if this CPU does not support it. No operation may be
// running.
bool choose_kernels(const char* name);

}  // namespace flashmoe
