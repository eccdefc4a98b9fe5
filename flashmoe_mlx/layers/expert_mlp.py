"""The arithmetic of a switch layer: mlx-lm's own, or kernels for SwiGLU experts."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU

from flashmoe_mlx.layers.projections import matrix_of
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.fused import Fused
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.products import gate_up, matvec, swiglu_experts

ExpertFunction = Callable[[mx.array, mx.array], mx.array]
"""Takes ``x``, ``[..., hidden]``, and slots, ``[..., top_k]``; returns ``[..., top_k, hidden]``."""


class ExpertMLP:
    """Computes experts, wherever they come from.

    Args:
        switch (nn.Module): mlx-lm's ``SwitchGLU`` or ``SwitchMLP``, holding the arrays to compute with.
        backend (Backend): The model's.

    Attributes:
        matrices (tuple, optional): Gate, up and down. ``None`` if no kernels of the backend compute such experts.
    """

    def __init__(self, switch: nn.Module, backend: Backend):
        self._backend = backend
        self._reference: ExpertFunction = switch.__call__
        self.matrices = None if backend is Backend.REFERENCE else _swiglu_matrices(switch)
        self._kernels = None if self.matrices is None else _fused(self.matrices, backend)

    def implementation(self, x: mx.array, indices: mx.array) -> ExpertFunction:
        """Choose what computes a call, once for all its waves: two choices round differently on a GPU."""
        if self.matrices is None or self._kernels is None:
            return self._reference
        gate, up, down = self.matrices
        served = gate_up.serves(self._backend, x, indices, gate, up) and matvec.serves(self._backend, x, indices, down)
        return self._kernels if served else self._reference

    def resident(self, x: mx.array, indices: mx.array, slots: mx.array) -> mx.array | None:
        """Compute the experts that are in slots, before the host knows which experts are needed.

        Args:
            x (mx.array): ``[..., hidden]``.
            indices (mx.array): Expert numbers ``[..., top_k]``.
            slots (mx.array): The slot of each of the layer's experts or ``NO_SLOT``, ``[experts]``, uint32.

        Returns:
            mx.array, optional: ``[..., top_k, hidden]``, zero for experts in no slot; ``None`` if no kernel computes
            this call.
        """
        compute = self.implementation(x, indices)
        return compute(x, slots[indices]) if compute is self._kernels else None

    def splits(self, function: ExpertFunction) -> bool:
        """Return whether a call computed in parts has the same bits.

        Kernels and MLX's CPU products compute each pair of token and expert by itself. On a GPU, MLX chooses its
        products by the shape of the whole call, and they round differently.
        """
        return function is self._kernels or mx.default_device().type == mx.cpu


def _fused(matrices: tuple[Quantized, Quantized, Quantized], backend: Backend) -> ExpertFunction:
    # Fused, because MLX prints a kernel's source whenever a graph is built of it. The matrices are captured, because
    # passing them takes as long as everything else.
    compute = swiglu_experts(*matrices, backend)
    fused = Fused(lambda x, slots: (compute(x, slots),), backend)
    return lambda x, slots: fused(x, slots)[0]


def _swiglu_matrices(switch: nn.Module) -> tuple[Quantized, Quantized, Quantized] | None:
    """Return gate, up and down of a switch layer, or ``None`` if kernels cannot compute it."""
    if not isinstance(switch, SwitchGLU) or type(switch.activation) is not SwiGLU:
        return None
    projections = (switch.gate_proj, switch.up_proj, switch.down_proj)
    for linear in projections:
        if not isinstance(linear, QuantizedSwitchLinear) or linear.mode != "affine" or "bias" in linear:
            return None
    gate, up, down = map(matrix_of, projections)
    return (gate, up, down) if gate.format == up.format else None
