"""Operations and their backends: each operation is a reference function; kernels register where they serve."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial, update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import mlx.core as mx

from flashmoe_mlx.ops import native

P = ParamSpec("P")
R = TypeVar("R")


class Backend(Enum):
    """A set of kernels. ``load`` chooses one for each model, and layers bind their operations to it."""

    REFERENCE = "MLX operations"
    NATIVE = "native CPU kernels"
    METAL = "Metal kernels"
    CUDA = "CUDA kernels"


GPUS = (Backend.METAL, Backend.CUDA)


def choose_backend(kernels: bool = True) -> Backend:
    """Choose the backend for MLX's default device.

    Args:
        kernels (bool): Use this package's kernels. ``False`` runs MLX operations alone. Default: ``True``.

    Returns:
        Backend: ``METAL`` or ``CUDA`` on a GPU; on a CPU ``NATIVE`` if the native kernels were built, else
        ``REFERENCE``, with one warning on Linux.
    """
    if not kernels:
        return Backend.REFERENCE
    if mx.default_device().type == mx.gpu:
        return Backend.CUDA if mx.cuda.is_available() else Backend.METAL
    return Backend.REFERENCE if native.kernels() is None else Backend.NATIVE


class _Kernel(NamedTuple):
    function: Callable[..., Any]
    serves: Callable[..., bool] | None


class Operation(Generic[P, R]):
    """A function of arrays with a reference in MLX operations and, per backend, a kernel that may take its place.

    The operation itself is never called: a layer binds it once with :meth:`on`.

    Args:
        reference (Callable): Defines what the operation computes. It runs on every device, and tests compare the
            kernels with it.

    Attributes:
        reference (Callable): The same function.
    """

    def __init__(self, reference: Callable[P, R]):
        self.reference = reference
        self._kernels: dict[Backend, _Kernel] = {}
        self.__name__ = reference.__name__
        self.__doc__ = reference.__doc__

    def kernel(
        self, *backends: Backend, serves: Callable[..., bool] | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the kernel of some backends.

        Args:
            backends (Backend): Where it runs.
            serves (Callable, optional): Takes the operation's arguments and tells whether the kernel can compute
                them; the reference computes the others. Default: ``None``, it computes all.
        """

        def register(function: Callable[P, R]) -> Callable[P, R]:
            for backend in backends:
                self._kernels[backend] = _Kernel(function, serves)
            return function

        return register

    def on(self, backend: Backend) -> Callable[P, R]:
        """Return the function that computes this operation on a backend."""
        if backend not in self._kernels:
            return self.reference

        def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
            kernel = self._kernel_for(backend, *args, **kwargs)
            if kernel is None:
                return self.reference(*args, **kwargs)
            if _observer is not None:
                kernel = partial(_observer, self, kernel)
            return kernel(*args, **kwargs)

        return update_wrapper(dispatch, self.reference)

    def serves(self, backend: Backend, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Return whether a kernel of the backend computes these arguments."""
        return self._kernel_for(backend, *args, **kwargs) is not None

    def disable(self, backend: Backend) -> None:
        """Let the reference compute everything on a backend from now on, also in layers that are bound already.

        Functions that ``mx.compile`` has traced keep what they called.
        """
        self._kernels.pop(backend, None)

    def _kernel_for(self, backend: Backend, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R] | None:
        kernel = self._kernels.get(backend)
        if kernel is None or (kernel.serves is not None and not kernel.serves(*args, **kwargs)):
            return None
        return kernel.function


Observer = Callable[..., Any]
"""Takes an operation, its kernel and the operands of a call; returns the output."""

_observer: Observer | None = None


@contextmanager
def observe_kernels(observer: Observer) -> Iterator[None]:
    """Let an observer compute each call that a kernel serves. ``mx.compile`` must be off, so that operands have values.

    Args:
        observer (Observer): Called in place of each kernel.
    """
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None
