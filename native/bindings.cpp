// The Python module: functions of mlx.core.array, which nanobind shares between modules of one domain, here MLX's.
#include <nanobind/nanobind.h>

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "chain.h"
#include "embedding.h"
#include "gated_delta.h"
#include "kernels.h"
#include "mlx/version.h"
#include "norm.h"
#include "products.h"
#include "routing.h"
#include "workers.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace nb = nanobind;
using namespace nb::literals;
using flashmoe::Quantized;
using mlx::core::array;

NB_MODULE(_native, m) {
  m.attr("mlx_version") = TEXT(MLX_VERSION_MAJOR) "." TEXT(MLX_VERSION_MINOR) "." TEXT(MLX_VERSION_PATCH);
  m.def("instruction_set", [] { return flashmoe::kernels().name; });
  m.def("choose_instruction_set", &flashmoe::choose_kernels);
  m.def("threads", [] { return flashmoe::Workers::shared().threads(); });
  m.def("set_threads", [](int threads) { flashmoe::Workers::shared().set_threads(threads); });
  m.def(
      "linear", [](const array& x, const array& weight, const array& scales, const array& biases, int group, int bits) {
        return flashmoe::linear(x, {weight, scales, biases}, {group, bits});
      });
  m.def(
      "embed",
      [](const array& numbers, const array& weight, const array& scales, const array& biases, int group, int bits) {
        return flashmoe::embed(numbers, {weight, scales, biases}, {group, bits});
      });
  m.def(
      "matvec",
      [](const array& x,
         const array& slots,
         const array& weight,
         const array& scales,
         const array& biases,
         int group,
         int bits) { return flashmoe::matvec(x, slots, {weight, scales, biases}, {group, bits}); });
  m.def(
      "gate_up",
      [](const array& x,
         const array& slots,
         const array& weight,
         const array& scales,
         const array& biases,
         const array& up_weight,
         const array& up_scales,
         const array& up_biases,
         int group,
         int bits) {
        return flashmoe::gate_up(x, slots, {weight, scales, biases}, {up_weight, up_scales, up_biases}, {group, bits});
      });
  m.def("attention", &flashmoe::attention);
  nb::class_<flashmoe::Chain>(m, "Chain")
      .def(nb::init<const std::vector<array>&, const std::vector<array>&>())
      .def("__call__", &flashmoe::Chain::operator());
  m.def("norm_rope", &flashmoe::norm_rope);
  m.def("decode_attention", &flashmoe::decode_attention);
  m.def("gated_delta", &flashmoe::gated_delta);
  m.def("rms_norm", &flashmoe::rms_norm);
  m.def("add_norm", &flashmoe::add_norm);
  m.def("combine", &flashmoe::combine);
  m.def("route", &flashmoe::route);
  m.def(
      "router_and_shared",
      [](const array& x,
         const array& weight,
         const array& scales,
         const array& biases,
         int group,
         int bits,
         const array& gate_weight,
         const array& gate_scales,
         const array& gate_biases,
         const array& up_weight,
         const array& up_scales,
         const array& up_biases,
         int shared_group,
         int shared_bits) {
        return flashmoe::router_and_shared(
            x,
            {weight, scales, biases},
            {group, bits},
            {gate_weight, gate_scales, gate_biases},
            {up_weight, up_scales, up_biases},
            {shared_group, shared_bits});
      });
}
