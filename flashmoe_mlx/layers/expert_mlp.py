"""What a switch layer computes: mlx-lm's own way, or the kernels' while tokens are few."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU

from flashmoe_mlx.ops import products as ops
from flashmoe_mlx.ops.dispatch import has_kernel
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.matrices import Quantized

ExpertFunction = Callable[[mx.array, mx.array], mx.array]


class Experts:
    """The arithmetic of a switch layer, without the question where its experts come from.

    Args:
        switch (nn.Module): mlx-lm's ``SwitchGLU`` or ``SwitchMLP``, with the arrays to compute with.
    """

    def __init__(self, switch: nn.Module):
        self._switch: ExpertFunction = switch.__call__
        self._matrices = _swiglu_matrices(switch)
        # Compiled, because MLX writes out a kernel's text whenever a graph is built of it. The matrices are inside,
        # because passing them takes as long as all the rest.
        self._kernels: ExpertFunction = _fused(self._matrices)

    def function(self, x: mx.array, indices: mx.array) -> ExpertFunction:
        """What computes a call: from ``x`` and where each expert is, ``[..., experts_per_token, hidden]``.

        The choice is one for a whole call, even if it is computed in parts: the two round differently on a GPU.
        """
        if self._matrices and has_kernel(x, indices, *self._matrices.values()):
            return self._kernels
        return self._switch

    def ahead(self, x: mx.array, indices: mx.array, places: mx.array) -> mx.array | None:
        """The experts that are in slots, for which the host need not know which are needed.

        Args:
            x (mx.array): ``[..., hidden]``.
            indices (mx.array): expert numbers ``[..., experts_per_token]``.
            places (mx.array): the slot of each expert, or ``NO_SLOT``, ``[experts]``, uint32.

        Returns:
            mx.array, optional: ``[..., experts_per_token, hidden]``, zero for experts that are in no slot. None if no
            kernel computes this call.
        """
        if self.function(x, indices) is not self._kernels:
            return None
        return self._kernels(x, places[indices])

    def splits(self, function: ExpertFunction) -> bool:
        """Whether a call may be computed in parts and stay the same to the bit.

        The kernels and MLX's products on a CPU compute a pair of token and expert by itself. On a GPU, MLX chooses
        its products by the shape of the whole call, and they round differently.
        """
        return function is self._kernels or mx.default_device().type == mx.cpu


def _fused(matrices: dict[str, Quantized]) -> ExpertFunction:
    fused = Fused(lambda x, slots: (ops.experts(x, slots, **matrices),))

    def experts(x: mx.array, slots: mx.array) -> mx.array:
        return fused(x, slots)[0]

    return experts


def _swiglu_matrices(switch: nn.Module) -> dict[str, Quantized]:
    """Return the matrices of a SwiGLU switch layer by projection; empty if the layer computes something else."""
    if not isinstance(switch, SwitchGLU) or type(switch.activation) is not SwiGLU:
        return {}
    projections = {"gate": switch.gate_proj, "up": switch.up_proj, "down": switch.down_proj}
    for linear in projections.values():
        if not isinstance(linear, QuantizedSwitchLinear) or linear.mode != "affine" or "bias" in linear:
            return {}
    gate, up = projections["gate"], projections["up"]
    if (gate.bits, gate.group_size) != (up.bits, up.group_size):
        return {}
    return {
        name: Quantized(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits)
        for name, linear in projections.items()
    }
