#include "quantized.h"

#include <algorithm>

#include "operation.h"

namespace mx = mlx::core;

namespace flashmoe {

void check(Format format) {
  const auto [group, bits] = format;
  require(bits >= 2 && bits <= 8 && bits != 7, "bits must be 2, 3, 4, 5, 6 or 8");
  require(group == 32 || group == 64 || group == 128, "group_size must be 32, 64 or 128");
}

void check(const Quantized& matrix, Format format, int columns, size_t ndim) {
  check(format);
  const auto [group, bits] = format;
  require(matrix.weight.dtype() == mx::uint32, "weight must be uint32");
  require(matrix.weight.ndim() == ndim && matrix.scales.ndim() == ndim, "weight and scales have too many or few axes");
  require(columns > 0 && columns % group == 0, "columns must be a positive multiple of group_size");
  require(matrix.weight.shape(-1) == columns / 32 * bits, "weight does not fit x");
  require(matrix.scales.shape(-1) == columns / group, "scales do not fit x");
  require(matrix.scales.shape() == matrix.biases.shape(), "scales and biases differ in shape");
  require(matrix.scales.dtype() == matrix.biases.dtype(), "scales and biases differ in dtype");
  require(
      mx::issubdtype(matrix.scales.dtype(), mx::floating) && matrix.scales.dtype() != mx::float64,
      "scales must be float32, float16 or bfloat16");
  require(
      std::equal(matrix.weight.shape().begin(), matrix.weight.shape().end() - 1, matrix.scales.shape().begin()),
      "weight and scales differ in rows or slots");
}

void check(const Quantized& matrix, Format format, const mx::array& x, size_t ndim) {
  require(x.dtype() == mx::float32 && x.ndim() >= 1, "x must be float32 [..., columns]");
  check(matrix, format, x.shape(-1), ndim);
}

Matrix next_matrix(const std::vector<mx::array>& inputs, size_t& next, Format format, int64_t columns) {
  const mx::array& weight = inputs[next++];
  const mx::array& scales = inputs[next++];
  const mx::array& biases = inputs[next++];
  return {
      .weight = weight.data<uint32_t>(),
      .scales = scales.data<void>(),
      .biases = biases.data<void>(),
      .stored = scales.dtype() == mx::float32 ? Scales::float32
          : scales.dtype() == mx::float16     ? Scales::float16
                                              : Scales::bfloat16,
      .rows = weight.shape(-2),
      .columns = columns,
      .group = format.group,
      .bits = format.bits,
  };
}

}  // namespace flashmoe
