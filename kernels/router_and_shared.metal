// The router's logits and the shared expert's gate_up, fused into one launch because they read the same input. The
// first threadgroups compute hidden activations, the others logits.
template <typename T, int BITS, int GROUP, int ROWS, int ROUTER_BITS, int ROUTER_GROUP, int SIMDGROUPS>
inline void router_and_shared(
    const device T* x,                // [tokens, columns]
    const device uint* gate_weight,   // [rows, columns * BITS / 32]
    const device T* gate_scales,      // [rows, columns / GROUP]
    const device T* gate_biases,
    const device uint* up_weight,
    const device T* up_scales,
    const device T* up_biases,
    const device uint* router_weight,  // [router rows, columns * ROUTER_BITS / 32]
    const device T* router_scales,     // [router rows, columns / ROUTER_GROUP]
    const device T* router_biases,
    device T* hidden,                  // [tokens, rows]
    device T* logits,                  // [tokens, router rows]
    int columns,
    int rows,
    int router_rows,
    int token,
    int threadgroup_index,
    int simdgroup,
    int lane) {
  const int gate_up_threadgroups = (rows + SIMDGROUPS * ROWS - 1) / (SIMDGROUPS * ROWS);
  if (threadgroup_index < gate_up_threadgroups) {
    gate_up<T, BITS, GROUP, ROWS, 32, 1>(
        x, FirstSlot(), gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases, hidden,
        columns, rows, token, threadgroup_index * SIMDGROUPS + simdgroup, lane);
  } else {
    linear<T, ROUTER_BITS, ROUTER_GROUP, 2, 32>(
        x, router_weight, router_scales, router_biases, logits,
        columns, router_rows, token, (threadgroup_index - gate_up_threadgroups) * SIMDGROUPS + simdgroup, lane);
  }
}
