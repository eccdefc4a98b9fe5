// The experts of a token and their scores: softmax over all, then the TOP_K largest, divided by their sum if NORMALIZE.
// The last logit is the shared expert's, whose score is its sigmoid.
//
// Gates are rounded to T before they are compared, and of equal gates the higher expert wins, as in mlx-lm. A simdgroup
// computes one token: lane l holds experts l, l + 32, ...
template <typename T, int EXPERTS, int TOP_K, bool NORMALIZE>
inline void route(
    const device T* logits,  // [tokens, EXPERTS + 1]
    device uint* experts,    // [tokens, TOP_K]
    device T* scores,        // [tokens, TOP_K + 1]
    int token,
    int lane) {
  constexpr int PER_LANE = (EXPERTS + 31) / 32;
  const device T* own = logits + (size_t)token * (EXPERTS + 1);
  float gates[PER_LANE];
  float largest = LOWEST;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int expert = i * 32 + lane;
    gates[i] = expert < EXPERTS ? float(own[expert]) : LOWEST;
    largest = max(largest, gates[i]);
  }
  largest = max_lanes(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    gates[i] = exp(gates[i] - largest);
    sum += gates[i];
  }
  const float scale = 1.0f / sum_lanes<32>(sum);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const float gate = float(T(gates[i] * scale));
    // NaN becomes 0, so that every comparison has a result.
    gates[i] = i * 32 + lane < EXPERTS ? (gate > 0.0f ? gate : 0.0f) : -1.0f;
  }

  float total = 0.0f, score = 0.0f;
  int chosen = 0;
  for (int k = TOP_K - 1; k >= 0; --k) {
    float best = -1.0f;
    int expert = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if (gates[i] >= best) {
        best = gates[i];
        expert = i * 32 + lane;
      }
    }
    const float value = max_lanes(best);
    // Expert numbers are exact in float32.
    expert = int(max_lanes(best == value ? float(expert) : -1.0f));
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if (i * 32 + lane == expert) {
        gates[i] = -1.0f;
      }
    }
    total += value;
    if (lane == k) {
      score = value;
      chosen = expert;
    }
  }
  if (lane < TOP_K) {
    experts[(size_t)token * TOP_K + lane] = chosen;
    scores[(size_t)token * (TOP_K + 1) + lane] = T(NORMALIZE ? score / total : score);
  }
  if (lane == TOP_K) {
    scores[(size_t)token * (TOP_K + 1) + lane] = T(1.0f / (1.0f + exp(-float(own[EXPERTS]))));
  }
}
