"""A function of several operations that costs the host little per call."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from flashmoe_mlx.ops import native
from flashmoe_mlx.ops.dispatch import Backend

# Shapes kept per function: a decode step asks for few.
_MAX_CHAINS = 8


class Fused:
    """Runs a function of arrays with little host work per call.

    On the native backend the operations inside become one MLX operation, if all of them are native. Elsewhere
    ``mx.compile`` keeps the graph.

    Args:
        function (Callable): Takes and returns arrays. It may depend on its arguments' shapes and dtypes only, and on
            arrays that never change.
        backend (Backend): The model's.
    """

    def __init__(self, function: Callable[..., Sequence[mx.array]], backend: Backend):
        self._function = function
        self._compiled: Callable[..., Sequence[mx.array]] = mx.compile(function)
        # One chain per input shapes, the newest first.
        self._chains: list[native.Chain] = []
        self._chainable = backend is Backend.NATIVE

    def __call__(self, *inputs: mx.array) -> Sequence[mx.array]:
        """Return what the function returns, lazily."""
        if not self._chainable or inputs[0].dtype != mx.float32:
            return self._compiled(*inputs)
        for chain in self._chains:
            if (outputs := chain(inputs)) is not None:
                return outputs
        traced = self._function(*inputs)
        try:
            self._chains = [native.require().Chain(inputs, traced), *self._chains[: _MAX_CHAINS - 1]]
        except ValueError:
            # An MLX operation lies between the native ones.
            self._chainable = False
        return traced
