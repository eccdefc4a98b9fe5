// out[token] = sum over its TOP_K experts of score * (weight[slot] x), where each expert has its own x.
//
// A threadgroup has one simdgroup for each expert; the first adds up what all of them found.
template <
    typename T,
    int BITS,
    int GROUP,
    int ROWS,
    int LANES,
    int TOP_K,
    typename Slots,
    typename Scores,
    typename Partial>
inline void down(
    const device T* x,          // [tokens * TOP_K, columns]
    Slots slots,                // [tokens * TOP_K], in device or constant memory
    Scores scores,              // [tokens * TOP_K], in device or constant memory
    const device uint* weight,  // [slots, rows, columns * BITS / 32]
    const device T* scales,     // [slots, rows, columns / GROUP]
    const device T* biases,
    device T* out,              // [tokens, rows]
    Partial partial,            // [TOP_K, ROWS * 32 / LANES], threadgroup memory
    int columns,
    int rows,
    int token,
    int tile,                   // of ROWS * 32 / LANES rows
    int expert,
    int lane) {
  constexpr int ROWS_ACROSS = 32 / LANES;
  constexpr int TILE = ROWS * ROWS_ACROSS;
  const size_t pair = (size_t)token * TOP_K + expert;
  const int first_row = tile * TILE + lane % ROWS_ACROSS;
  float dots[ROWS];
  dot_rows<T, BITS, GROUP, ROWS, LANES>(
      x + pair * columns, weight, scales, biases, slots[pair], columns, rows, first_row, lane, dots);
  const float score = float(scores[pair]);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (lane < ROWS_ACROSS) {
      partial[expert * TILE + r * ROWS_ACROSS + lane] = score * dots[r];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int row = tile * TILE + lane;
  if (expert == 0 && lane < TILE && row < rows) {
    float total = 0.0f;
    for (int e = 0; e < TOP_K; ++e) {
      total += partial[e * TILE + lane];
    }
    out[(size_t)token * rows + row] = T(total);
  }
}
