// The operands of attention from projections: queries and keys with the RMS norm of each head, then RoPE of its first
// DIMS elements, which rotates elements i and i + DIMS / 2 together; values are copied. A simdgroup computes one head
// of one token.
template <typename T, int DIM, int DIMS, int HEADS, int KEY_HEADS, typename Position, typename Rope>
inline void norm_rope(
    const device T* x,       // [tokens, width]: a query and its gate for each of HEADS, then keys, then values
    const device T* q_norm,  // [DIM]
    const device T* k_norm,  // [DIM]
    Position position,       // [1]: of the first token
    Rope rope,               // [3]: log2 of the base, scale of positions, eps of the norms
    device T* queries,       // [HEADS, tokens, DIM]
    device T* keys,          // [KEY_HEADS, tokens, DIM]
    device T* values,        // [KEY_HEADS, tokens, DIM]
    int tokens,
    int width,
    int head,
    int token,
    int lane) {
  constexpr int HALF = DIMS / 2;
  const device T* from = x + (size_t)token * width + (head < HEADS ? 2 * head : HEADS + head) * DIM;
  if (head >= HEADS + KEY_HEADS) {
    device T* to = values + ((size_t)(head - HEADS - KEY_HEADS) * tokens + token) * DIM;
    for (int i = lane; i < DIM; i += 32) {
      to[i] = from[i];
    }
    return;
  }
  const device T* norm = head < HEADS ? q_norm : k_norm;
  const size_t row = (size_t)(head < HEADS ? head : head - HEADS) * tokens + token;
  device T* to = (head < HEADS ? queries : keys) + row * DIM;
  // Elements of a lane, and how many of them RoPE may rotate.
  constexpr int OWN = (DIM + 31) / 32;
  constexpr int ROTATED = (DIMS + 31) / 32;
  float value[OWN], weight[OWN], sine[ROTATED], cosine[ROTATED], other[ROTATED];
#pragma unroll
  for (int n = 0; n < OWN; ++n) {
    const int i = min(n * 32 + lane, DIM - 1);
    value[n] = float(from[i]);
    weight[n] = float(norm[i]);
  }
#pragma unroll
  for (int n = 0; n < ROTATED; ++n) {
    const int i = min(n * 32 + lane, DIMS - 1);
    const int pair = i < HALF ? i + HALF : i - HALF;
    const float frequency = exp2(-(float(i % HALF) / HALF) * rope[0]);
    const float angle = float(position[0] + token) * rope[1] * frequency;
    other[n] = (i < HALF ? -1.0f : 1.0f) * float(from[pair]) * float(norm[pair]);
    sine[n] = sin(angle);
    cosine[n] = cos(angle);
  }
  float squares = 0.0f;
#pragma unroll
  for (int n = 0; n < OWN; ++n) {
    squares = n * 32 + lane < DIM ? fma(value[n], value[n], squares) : squares;
  }
  const float scale = rsqrt(sum_lanes<32>(squares) / DIM + rope[2]);
#pragma unroll
  for (int n = 0; n < OWN; ++n) {
    const int i = n * 32 + lane;
    float rotated = value[n] * scale * weight[n];
    if (i < DIMS) {
      rotated = rotated * cosine[min(n, ROTATED - 1)] + scale * other[min(n, ROTATED - 1)] * sine[min(n, ROTATED - 1)];
    }
    if (i < DIM) {
      to[i] = T(rotated);
    }
  }
}
