// out = weight x, a dense layer: matvec with every vector in slot 0.
struct FirstSlot {
  inline uint operator[](int) const {
    return 0;
  }
};

template <typename T, int BITS, int GROUP, int ROWS, int LANES>
inline void linear(
    const device T* x,          // [vectors, columns]
    const device uint* weight,  // [rows, columns * BITS / 32]
    const device T* scales,     // [rows, columns / GROUP]
    const device T* biases,
    device T* out,              // [vectors, rows]
    int columns,
    int rows,
    int vector,
    int simdgroup,
    int lane) {
  matvec<T, BITS, GROUP, ROWS, LANES>(
      x, FirstSlot(), weight, scales, biases, out, columns, rows, vector, simdgroup, lane);
}
