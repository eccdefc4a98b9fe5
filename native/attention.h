// Attention, and the norms and RoPE in front of it, as lazy MLX operations on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// Attention in float32, softmax(scale * queries keys^T) values: queries are [batch, heads, tokens, size], keys and
// values [batch, key_heads, seen, size] with rows of any strides. Returns [batch, tokens, heads, size], contiguous. If
// causal, the last token sees all keys, and each token before it one less.
mlx::core::array attention(
    const mlx::core::array& queries,
    const mlx::core::array& keys,
    const mlx::core::array& values,
    float scale,
    bool causal);

// The operands of attention from projections, float32 [batch, tokens, width]: queries [batch, heads, tokens, size], and
// keys and values [batch, key_heads, tokens, size]. Queries and keys get the RMS norm of each head, then RoPE; values
// are copied.
//
// A row of x has for each head its query and the gate of its output, then the keys, then the values. RoPE rotates
// elements i and i + count of a head by position * frequencies[i], for `count` frequencies. `position` is that of the
// first token, int32 [1].
std::vector<mlx::core::array> norm_rope(
    const mlx::core::array& x,
    const mlx::core::array& q_norm,
    const mlx::core::array& k_norm,
    const mlx::core::array& position,
    const mlx::core::array& frequencies,
    int heads,
    int key_heads,
    float eps);

// Causal attention of the last tokens of a sequence, times the sigmoid of the output's gate, float32
// [batch, tokens, heads * size]. Keys and values have a capacity that may exceed the length of the sequence. `position`
// is that of the first token, int32 [1], and x has the gates, as for norm_rope().
mlx::core::array decode_attention(
    const mlx::core::array& queries,
    const mlx::core::array& keys,
    const mlx::core::array& values,
    const mlx::core::array& position,
    const mlx::core::array& x,
    float scale);

}  // namespace flashmoe
