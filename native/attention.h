// Attention as one lazy MLX operation on the CPU.
#pragma once

#include "mlx/array.h"

namespace flashmoe {

// softmax(scale * queries keys^T) values, all float32: queries [batch, heads, tokens, size], keys and values
// [batch, key_heads, seen, size], whose rows may lie anywhere. Returns [batch, tokens, heads, size], contiguous. Causal:
// the last token sees all keys, each before it one less.
mlx::core::array attention(
    const mlx::core::array& queries,
    const mlx::core::array& keys,
    const mlx::core::array& values,
    float scale,
    bool causal);

}  // namespace flashmoe
