"""Self-check of GPU kernels: each is compared with its reference before a model uses it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from flashmoe_mlx.ops.dispatch import Backend, Operation
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.routing import route

# Largest RMS error relative to the RMS of what the reference computes in float32. Kernels accumulate in float32 and
# round once, so they stay far below; the reference may compute in TF32. One wrong element in 2000 is far above.
_TOLERANCES = {mx.float32: 2**-7, mx.float16: 2**-7, mx.bfloat16: 2**-6}
# Norm of an output that is as good as zero.
_SMALLEST = 1e-20
# Of an error message in a warning.
_MAX_CHARACTERS = 300


class SelfCheck:
    """Runs each kernel that it observes once per shapes, dtypes and settings of its operands, and its reference too.

    An operation whose kernel raises or differs is computed by its reference for the rest of the process, with one
    warning.

    Args:
        backend (Backend): The kernels'.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._seen: set[Any] = set()

    def __call__(self, operation: Operation[..., Any], kernel: Callable[..., Any], *operands: Any) -> Any:
        """Return the reference's output, having compared the kernel's with what the reference computes in float32."""
        case = operation.__name__, *map(_signature, operands)
        if case not in self._seen:
            self._seen.add(case)
            if fault := _fault(operation, kernel, operands):
                operation.disable(self._backend)
                dims = " ".join(_words(operands))
                warnings.warn(
                    f"{operation.__name__} runs without its kernel, slower: on {dims} it {fault}. Please report this",
                    stacklevel=2,
                )
        return operation.reference(*operands)


def describe_error(error: Exception) -> str:
    """Describe what a kernel raised in one line: compilers write pages."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:_MAX_CHARACTERS]}"


def _fault(operation: Operation[..., Any], kernel: Callable[..., Any], operands: Sequence[Any]) -> str | None:
    """Return what is wrong with a kernel, or ``None``."""
    wanted = _comparable(operation, operands, operation.reference(*map(_widened, operands)))
    # Outside of the try: an error of the reference is not the kernel's.
    mx.eval(wanted)
    try:
        actual = _comparable(operation, operands, kernel(*operands))
        mx.eval(actual)
    # MLX raises RuntimeError for sources that do not compile and for too many threads, and ValueError for operands.
    except Exception as error:
        return describe_error(error)
    tolerance = _TOLERANCES[operands[0].dtype]
    errors = [_error(a, w) for a, w in zip(actual, wanted, strict=True)]
    # NaN is not below anything.
    if all(error < tolerance for error in errors):
        return None
    return f"differs from MLX's operations by {max(errors, key=lambda e: (e != e, e)):.2g}, allowed is {tolerance:.2g}"


def _comparable(operation: Operation[..., Any], operands: Sequence[Any], outputs: Any) -> list[mx.array]:
    """Return outputs such that equal positions must have equal values."""
    if operation is route:
        # Experts come in any order, and of equal ones either may be chosen.
        experts, scores = outputs
        order = mx.argsort(scores[..., :-1], axis=-1)
        chosen = mx.take_along_axis(experts, order, axis=-1)
        logits = mx.take_along_axis(operands[0], mx.minimum(chosen, operands[0].shape[-1] - 1), axis=-1)
        return [logits, mx.take_along_axis(scores, order, axis=-1), scores[..., -1:]]
    return [outputs] if isinstance(outputs, mx.array) else list(outputs)


def _error(actual: mx.array, wanted: mx.array) -> float:
    """Return the RMS error relative to the RMS of what is wanted; zero if that is not finite."""
    actual, wanted = actual.astype(mx.float32), wanted.astype(mx.float32)
    size = float(mx.linalg.norm(wanted))
    if not math.isfinite(size):
        return 0.0
    return float(mx.linalg.norm(actual - wanted)) / max(size, _SMALLEST)


def _widened(operand: Any) -> Any:
    """Return an operand with half precision widened to float32."""
    if isinstance(operand, mx.array):
        return operand.astype(mx.float32) if operand.dtype in (mx.float16, mx.bfloat16) else operand
    return type(operand)(*map(_widened, operand)) if hasattr(operand, "_fields") else operand


def _signature(operand: Any) -> Any:
    """Return what kernels are compiled for: everything of an operand but values."""
    if isinstance(operand, mx.array):
        return operand.shape, operand.dtype
    return tuple(map(_signature, operand)) if isinstance(operand, tuple) else operand


def _words(operands: Sequence[Any]) -> list[str]:
    """Describe arrays and integers among operands, e.g. ``bfloat16[1,1,4096]`` or ``4-bit/64[512,1024,4096]``."""
    words = []
    for operand in operands:
        if isinstance(operand, Quantized):
            shape = (*operand.scales.shape[:-1], operand.scales.shape[-1] * operand.group_size)
            words.append(f"{operand.bits}-bit/{operand.group_size}[{','.join(map(str, shape))}]")
        elif isinstance(operand, mx.array):
            words.append(f"{str(operand.dtype).rpartition('.')[2]}[{','.join(map(str, operand.shape))}]")
        elif isinstance(operand, tuple):
            words += [word for word in _words(operand) if word.endswith("]")]
        elif isinstance(operand, int):
            words.append(str(operand))
    return words
