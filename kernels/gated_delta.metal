// A GatedDeltaNet layer between its projections, for a decode step of one sequence: convolution over time, SiLU, L2
// norms of query and key, the gated delta rule, and the gated norm of its output.
//
// For each value head, with its state S of DV rows and DK columns, and each token:
//
//     S = exp(-exp(a_log) softplus(a + dt_bias)) S;   S += sigmoid(b) (v - S k) k^T;   y = silu(z) rms_norm(S q)
//
// A threadgroup computes one value head. A simdgroup keeps ROWS rows of its state in registers, a lane DK / 32 columns
// of them.

// The parts of a row of projections, in the order of `layout`.
constant constexpr int QUERY = 0, KEY = 1, VALUE = 2, GATE = 3, BETA = 4, DECAY = 5;

inline float silu(float x) {
  return x / (1.0f + exp(-x));
}

template <
    typename T,
    int DK,
    int DV,
    int TAPS,
    int KEY_HEADS,
    int VALUE_HEADS,
    int SIMDGROUPS,
    typename Layout,
    typename Decays,
    typename Biases,
    typename Norm,
    typename Eps,
    typename Shared>
inline void gated_delta(
    const device T* x,              // [tokens, width], the projections
    Layout layout,                  // [6, 2]: the column of each part in key head 0, and the distance to the next head
    const device T* window,         // [TAPS - 1, channels], queries, keys and values of the last tokens
    const device float* state,      // [VALUE_HEADS, DV, DK]
    const device T* taps,           // [channels, TAPS]
    Decays a_log,                   // [VALUE_HEADS], in device or constant memory
    Biases dt_bias,                 // [VALUE_HEADS]
    Norm norm,                      // [DV]
    Eps eps,                        // [1]
    device T* out,                  // [tokens, VALUE_HEADS * DV]
    device T* next_window,          // [TAPS - 1, channels]
    device float* next_state,       // [VALUE_HEADS, DV, DK]
    Shared convolved,               // [2 * DK + DV], threadgroup memory
    Shared y,                       // [DV], threadgroup memory
    int tokens,
    int width,
    int head,
    int simdgroup,
    int lane) {
  // Value heads that share a key head.
  constexpr int SHARE = VALUE_HEADS / KEY_HEADS;
  constexpr int CHANNELS = 2 * KEY_HEADS * DK + VALUE_HEADS * DV;
  constexpr int ROWS = DV / SIMDGROUPS;
  constexpr int COLUMNS = DK / 32;
  const int key_head = head / SHARE;
  const int of_share = head % SHARE;
  const int first = simdgroup * 32 + lane;

  float s[ROWS][COLUMNS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const size_t row = (size_t)head * DV + simdgroup * ROWS + r;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      s[r][c] = state[row * DK + lane * COLUMNS + c];
    }
  }

  for (int t = 0; t < tokens; ++t) {
    for (int i = first; i < 2 * DK + DV; i += 32 * SIMDGROUPS) {
      const int part = i < DK ? QUERY : i < 2 * DK ? KEY : VALUE;
      const int element = part == VALUE ? of_share * DV + i - 2 * DK : i - part * DK;
      const int column = layout[2 * part] + key_head * layout[2 * part + 1] + element;
      const int channel = part * KEY_HEADS * DK + key_head * (part == VALUE ? SHARE * DV : DK) + element;
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) {
        const int token = t + tap - (TAPS - 1);
        const T value = token < 0 ? window[(token + TAPS - 1) * CHANNELS + channel] : x[(size_t)token * width + column];
        sum = fma(float(value), float(taps[channel * TAPS + tap]), sum);
      }
      convolved[i] = silu(sum);
      if (t == tokens - 1 && (part == VALUE || of_share == 0)) {
#pragma unroll
        for (int kept = 0; kept < TAPS - 1; ++kept) {
          const int token = tokens - (TAPS - 1) + kept;
          next_window[kept * CHANNELS + channel] =
              token < 0 ? window[(token + TAPS - 1) * CHANNELS + channel] : x[(size_t)token * width + column];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float q[COLUMNS], k[COLUMNS];
    float q_squares = 0.0f, k_squares = 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      q[c] = convolved[lane * COLUMNS + c];
      k[c] = convolved[DK + lane * COLUMNS + c];
      q_squares = fma(q[c], q[c], q_squares);
      k_squares = fma(k[c], k[c], k_squares);
    }
    const float q_scale = rsqrt(sum_lanes<32>(q_squares) + 1e-6f) * rsqrt(float(DK));
    const float k_scale = rsqrt(sum_lanes<32>(k_squares) + 1e-6f);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      q[c] *= q_scale;
      k[c] *= k_scale;
    }
    const device T* row = x + (size_t)t * width;
    const float b = float(row[layout[2 * BETA] + key_head * layout[2 * BETA + 1] + of_share]);
    const float a = float(row[layout[2 * DECAY] + key_head * layout[2 * DECAY + 1] + of_share]) + float(dt_bias[head]);
    const float softplus = max(a, 0.0f) + log(1.0f + exp(-fabs(a)));
    const float decay = exp(-exp(float(a_log[head])) * softplus);
    const float beta = 1.0f / (1.0f + exp(-b));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float prediction = 0.0f;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        s[r][c] *= decay;
        prediction = fma(s[r][c], k[c], prediction);
      }
      const float delta = (convolved[2 * DK + simdgroup * ROWS + r] - sum_lanes<32>(prediction)) * beta;
      float output = 0.0f;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        s[r][c] = fma(k[c], delta, s[r][c]);
        output = fma(s[r][c], q[c], output);
      }
      output = sum_lanes<32>(output);
      if (lane == 0) {
        y[simdgroup * ROWS + r] = output;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float squares = 0.0f;
    for (int i = lane; i < DV; i += 32) {
      squares = fma(y[i], y[i], squares);
    }
    const float scale = rsqrt(sum_lanes<32>(squares) / DV + eps[0]);
    const device T* z = row + layout[2 * GATE] + key_head * layout[2 * GATE + 1] + of_share * DV;
    for (int i = first; i < DV; i += 32 * SIMDGROUPS) {
      out[((size_t)t * VALUE_HEADS + head) * DV + i] = T(y[i] * scale * float(norm[i]) * silu(float(z[i])));
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const size_t row = (size_t)head * DV + simdgroup * ROWS + r;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      next_state[row * DK + lane * COLUMNS + c] = s[r][c];
    }
  }
}
