// Routing of tokens to experts, as lazy MLX operations on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "quantized.h"

namespace flashmoe {

// The router's logits, router x, and the shared expert's hidden activations, silu(gate x) * (up x), in one operation:
// they read the same input. For x [..., columns] they are [..., router rows] and [..., gate rows].
std::vector<mlx::core::array> router_and_shared(
    const mlx::core::array& x,
    const Quantized& router,
    Format router_format,
    const Quantized& gate,
    const Quantized& up,
    Format shared_format);

// The top_k most probable experts of each token, uint32 [..., top_k], in no particular order, and their scores, float32
// [..., top_k + 1].
//
// Logits are float32 [..., experts + 1]. Scores are the softmax over the experts, divided by their sum if `normalize`
// is set; the last score is the sigmoid of the last logit, the shared expert's. Of equal logits the higher numbers win.
std::vector<mlx::core::array> route(const mlx::core::array& logits, int top_k, bool normalize);

}  // namespace flashmoe
