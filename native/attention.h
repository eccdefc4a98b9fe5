// Attention, and what goes before it, as lazy MLX operations on the CPU.
#pragma once

#include <vector>

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

// Of what is projected, float32 [batch, tokens, width], the queries [batch, heads, tokens, size], keys and values
// [batch, key_heads, tokens, size] of attention: the norm of each head, then RoPE, but values as they are. A row has for
// each head its query and its output's gate, then the keys, then the values. Element i of a head turns with element
// i + count by position * frequencies[i], for count frequencies; position is that of the first token, int32 [1].
std::vector<mlx::core::array> norm_rope(
    const mlx::core::array& x,
    const mlx::core::array& q_norm,
    const mlx::core::array& k_norm,
    const mlx::core::array& position,
    const mlx::core::array& frequencies,
    int heads,
    int key_heads,
    float eps);

// Causal attention of tokens that are the last of their sequence, times the sigmoid of the output's gate, float32
// [batch, tokens, heads * size]. Keys and values have room for more than all positions; position is that of the first
// token, int32 [1], and x what is projected, as for norm_rope.
mlx::core::array attend(
    const mlx::core::array& queries,
    const mlx::core::array& keys,
    const mlx::core::array& values,
    const mlx::core::array& position,
    const mlx::core::array& x,
    float scale);

}  // namespace flashmoe
