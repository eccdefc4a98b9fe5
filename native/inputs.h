// What an operation on the CPU does with its inputs first.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flashmoe {

// The inputs, each element after the other in memory: as they are, or copies that live until the stream has used them.
std::vector<mlx::core::array> contiguous_inputs(
    const std::vector<mlx::core::array>& inputs, const mlx::core::Stream& stream);

}  // namespace flashmoe
