// out = x + sum over experts of score * y + the shared expert's score * shared. A thread makes one element.
template <typename T, int TOP_K, typename Scores>
inline void combine(
    const device T* x,       // [tokens, hidden]
    const device T* y,       // [tokens, TOP_K, hidden]
    Scores scores,           // [tokens, TOP_K + 1], in device or constant memory
    const device T* shared,  // [tokens, hidden]
    device T* out,           // [tokens, hidden]
    int hidden,
    int token,
    int i) {
  if (i < hidden) {
    const size_t at = (size_t)token * hidden + i;
    float sum = float(scores[token * (TOP_K + 1) + TOP_K]) * float(shared[at]);
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
      sum = fma(float(scores[token * (TOP_K + 1) + k]), float(y[((size_t)token * TOP_K + k) * hidden + i]), sum);
    }
    out[at] = T(float(x[at]) + sum);
  }
}
