// Products with quantized matrices, as lazy MLX operations on the CPU.
#pragma once

#include "mlx/array.h"
#include "quantized.h"

namespace flashmoe {

// matrix x for each vector of x [..., columns]: [..., rows].
mlx::core::array linear(const mlx::core::array& x, const Quantized& matrix, Format format);

// matrix[slot] x for each slot [..., top_k] and its own vector [..., top_k, columns]: [..., top_k, rows].
mlx::core::array matvec(
    const mlx::core::array& x, const mlx::core::array& slots, const Quantized& matrix, Format format);

// silu(gate[slot] x) * (up[slot] x) for each slot [..., top_k] and the vector of its token [..., columns]:
// [..., top_k, rows].
mlx::core::array gate_up(
    const mlx::core::array& x,
    const mlx::core::array& slots,
    const Quantized& gate,
    const Quantized& up,
    Format format);

}  // namespace flashmoe
