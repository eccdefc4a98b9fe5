// The choice of experts as one lazy MLX operation on the CPU.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// Of logits, float32 [..., experts + 1], the most likely experts, uint32 [..., top_k], of equal ones those of higher
// numbers; and their probabilities, which add up to 1 if normalised, followed by the sigmoid of the last logit, float32
// [..., top_k + 1].
std::vector<mlx::core::array> route(const mlx::core::array& logits, int top_k, bool normalize);

}  // namespace flashmoe
