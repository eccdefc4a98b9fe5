// out[pair] = silu(gate[slot] x) * (up[slot] x), for each pair of a token and an expert that it is routed to.
//
// A lane computes ROWS rows of gate and of up, so that an activation is loaded once for all of them. `simdgroup` counts
// those that share the pair.
template <typename T, int BITS, int GROUP, int ROWS, int LANES, int TOP_K, typename Slots>
inline void gate_up(
    const device T* x,               // [tokens, columns]
    Slots slots,                     // [tokens * TOP_K], in device or constant memory
    const device uint* gate_weight,  // [slots, rows, columns * BITS / 32]
    const device T* gate_scales,     // [slots, rows, columns / GROUP]
    const device T* gate_biases,
    const device uint* up_weight,
    const device T* up_scales,
    const device T* up_biases,
    device T* out,                   // [tokens * TOP_K, rows]
    int columns,
    int rows,
    int pair,
    int simdgroup,
    int lane) {
  constexpr int ROWS_ACROSS = 32 / LANES;
  // Enough loads in flight, without spilling registers.
  constexpr int UNROLL = 2 / ROWS;
  const size_t slot = slots[pair];
  const int blocks = slot == NO_SLOT ? 0 : columns / BLOCK;
  const int first_row = simdgroup * ROWS * ROWS_ACROSS + lane % ROWS_ACROSS;
  const device T* token = x + (size_t)(pair / TOP_K) * columns;
  float gate[ROWS] = {};
  float up[ROWS] = {};
#pragma unroll UNROLL
  for (int block = lane / ROWS_ACROSS; block < blocks; block += LANES) {
    float activations[BLOCK];
    const float sum = load_activations<T, BITS>(token + block * BLOCK, activations);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = min(first_row + r * ROWS_ACROSS, rows - 1);
      const size_t at = (slot * rows + row) * blocks + block;
      gate[r] += dot_block<T, BITS, GROUP>(gate_weight, gate_scales, gate_biases, at, activations, sum);
      up[r] += dot_block<T, BITS, GROUP>(up_weight, up_scales, up_biases, at, activations, sum);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = first_row + r * ROWS_ACROSS;
    const float g = sum_lanes<LANES>(gate[r]);
    const float u = sum_lanes<LANES>(up[r]);
    if (lane < ROWS_ACROSS && row < rows) {
      out[(size_t)pair * rows + row] = T(g / (1.0f + exp(-g)) * u);
    }
  }
}
