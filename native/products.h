// Products with quantised matrices as lazy MLX operations on the CPU.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// A stack of matrices in MLX's affine quantisation.
struct Quantized {
  mlx::core::array weight;  // [slots, rows, columns * bits / 32], uint32; a single matrix has no slots
  mlx::core::array scales;  // [slots, rows, columns / group], float32, float16 or bfloat16
  mlx::core::array biases;
};

// How a matrix is quantised.
struct Format {
  int group, bits;

  bool operator==(const Format&) const = default;
};

// Throws std::invalid_argument if this is no single matrix of so many columns.
void check(int columns, const Quantized& matrix, Format format);

// [..., rows]: matrix x for each vector of x [..., columns].
mlx::core::array linear(const mlx::core::array& x, const Quantized& matrix, int group, int bits);

// [..., top_k, rows]: matrix[slot] x for each slot [..., top_k] and its own vector [..., top_k, columns].
mlx::core::array matvec(
    const mlx::core::array& x, const mlx::core::array& slots, const Quantized& matrix, int group, int bits);

// [..., top_k, rows]: silu(gate[slot] x) * (up[slot] x) for each slot and the token's vector [..., columns].
mlx::core::array gate_up(
    const mlx::core::array& x,
    const mlx::core::array& slots,
    const Quantized& gate,
    const Quantized& up,
    int group,
    int bits);

// [..., router's rows]: router x, and [..., gate's rows]: silu(gate x) * (up x), for each vector of x [..., columns].
std::vector<mlx::core::array> ask(
    const mlx::core::array& x,
    const Quantized& router,
    Format asked,
    const Quantized& gate,
    const Quantized& up,
    Format shared);

}  // namespace flashmoe
