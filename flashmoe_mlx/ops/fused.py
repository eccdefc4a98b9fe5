"""Functions of arrays that cost the host little per call."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from flashmoe_mlx.ops import native
from flashmoe_mlx.ops.dispatch import native_kernels

_MOST_CHAINS = 8  # of a function: decoding asks for few shapes


class Fused:
    """A function of arrays that returns some, and costs the host little: on a CPU it is one operation if all that it
    computes are native kernels, elsewhere ``mx.compile`` keeps what it builds.

    Args:
        function (Callable): depends on its arguments' shapes and dtypes only, and on arrays that never change.
    """

    def __init__(self, function: Callable[..., Sequence[mx.array]]):
        self._function = function
        self._compiled: Callable[..., Sequence[mx.array]] = mx.compile(function)
        self._chains: list[native.Chain] = []  # one for each of the shapes that were asked for, the newest first
        self._foreign = False

    def __call__(self, *inputs: mx.array) -> Sequence[mx.array]:
        """What the function returns, lazily."""
        kernels = None if self._foreign else native_kernels(inputs[0])
        if kernels is None:
            return self._compiled(*inputs)
        for chain in self._chains:
            if (made := chain(inputs)) is not None:
                return made
        outputs = self._function(*inputs)
        try:
            self._chains = [kernels.Chain(inputs, outputs), *self._chains[: _MOST_CHAINS - 1]]
        except ValueError:  # MLX computes a part of it
            self._foreign = True
        return outputs
