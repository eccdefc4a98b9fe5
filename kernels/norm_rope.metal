// The queries and keys of a few tokens: each head's RMS norm, then RoPE of its first DIMS elements, where element i turns
// together with element i + DIMS / 2. A simdgroup takes one head of one token.
template <typename T, int DIM, int DIMS, int HEADS, typename Position, typename Rope>
inline void norm_rope(
    const device T* x,       // [tokens, width]: for each of HEADS a query and its gate, then the keys, then values
    const device T* q_norm,  // [DIM]
    const device T* k_norm,  // [DIM]
    Position position,       // [1]: of the first token
    Rope rope,               // [3]: log2 of the base, scale of positions, eps of the norms
    device T* queries,       // [HEADS, tokens, DIM]
    device T* keys,          // [key heads, tokens, DIM]
    int tokens,
    int width,
    int head,
    int token,
    int lane) {
  constexpr int HALF = DIMS / 2;
  const int column = head < HEADS ? 2 * head * DIM : (HEADS + head) * DIM;
  const device T* from = x + (size_t)token * width + column;
  const device T* norm = head < HEADS ? q_norm : k_norm;
  const size_t place = (size_t)(head < HEADS ? head : head - HEADS) * tokens + token;
  device T* to = (head < HEADS ? queries : keys) + place * DIM;
  float squares = 0.0f;
  for (int i = lane; i < DIM; i += 32) {
    squares = fma(float(from[i]), float(from[i]), squares);
  }
  const float scale = rsqrt(sum_lanes<32>(squares) / DIM + rope[2]);
  for (int i = lane; i < DIM; i += 32) {
    float value = float(from[i]) * scale * float(norm[i]);
    if (i < DIMS) {
      const int pair = i < HALF ? i + HALF : i - HALF;
      const float other = float(from[pair]) * scale * float(norm[pair]);
      const float frequency = exp2(-(float(i % HALF) / HALF) * rope[0]);
      const float angle = float(position[0] + token) * rope[1] * frequency;
      value = value * cos(angle) + (i < HALF ? -other : other) * sin(angle);
    }
    to[i] = T(value);
  }
}
