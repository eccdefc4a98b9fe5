// out[i] = weight[slot] x[i]. `simdgroup` counts those that share the vector.
template <typename T, int BITS, int GROUP, int ROWS, int LANES, typename Slots>
inline void matvec(
    const device T* x,          // [vectors, columns]
    Slots slots,                // [vectors], in device or constant memory
    const device uint* weight,  // [slots, rows, columns * BITS / 32]
    const device T* scales,     // [slots, rows, columns / GROUP]
    const device T* biases,
    device T* out,              // [vectors, rows]
    int columns,
    int rows,
    int vector,
    int simdgroup,
    int lane) {
  constexpr int ROWS_ACROSS = 32 / LANES;
  const int first_row = simdgroup * ROWS * ROWS_ACROSS + lane % ROWS_ACROSS;
  float dots[ROWS];
  dot_rows<T, BITS, GROUP, ROWS, LANES>(
      x + (size_t)vector * columns, weight, scales, biases, slots[vector], columns, rows, first_row, lane, dots);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = first_row + r * ROWS_ACROSS;
    if (lane < ROWS_ACROSS && row < rows) {
      out[(size_t)vector * rows + row] = T(dots[r]);
    }
  }
}
