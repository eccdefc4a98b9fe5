"""A kernel that raises or differs from its reference is disabled with one warning, and no other is."""

import warnings
from collections.abc import Callable

import mlx.core as mx
import pytest

from flashmoe_mlx.ops.dispatch import Backend, Operation, observe_kernels
from flashmoe_mlx.ops.matrices import Quantized
from flashmoe_mlx.ops.routing import route
from flashmoe_mlx.ops.self_check import SelfCheck
from tests.support.operands import normal, quantized

Scale = Operation[[mx.array, mx.array], tuple[mx.array, mx.array]]


def scaling(kernel: Callable[[mx.array, mx.array], object]) -> Scale:
    """An operation on Metal with this kernel."""

    @Operation
    def scaling(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        return x * y, mx.zeros_like(x)

    scaling.kernel(Backend.METAL)(kernel)
    return scaling


def check(operation: Scale, x: mx.array, y: mx.array) -> None:
    """Run a checked call, which returns what the reference does."""
    with observe_kernels(SelfCheck(Backend.METAL)):
        product, _ = operation.on(Backend.METAL)(x, y)
    assert mx.array_equal(product, x * y)


def raising(x: mx.array, y: mx.array) -> object:
    raise RuntimeError("[metal::Device] Unable to build metal library from source\n" + "error: too many\n" * 200)


def noisy(x: mx.array, y: mx.array) -> object:
    return normal(9, *x.shape), mx.zeros_like(x)


def not_a_number(x: mx.array, y: mx.array) -> object:
    return mx.where(mx.arange(x.shape[-1]) == 77, float("nan"), x * y), mx.zeros_like(x)


def two_wrong_rows(x: mx.array, y: mx.array) -> object:
    return mx.where(mx.arange(x.shape[-1]) < 2, 0, x * y), mx.zeros_like(x)


def wrong_zeros(x: mx.array, y: mx.array) -> object:
    return x * y, mx.full(x.shape, 1e-3)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (raising, r"it raised RuntimeError: \[metal::Device\] Unable to build metal library from source error: too"),
        (noisy, r"it differs from MLX's operations by 1\.\d, allowed is 0\.0078"),
        (not_a_number, "it differs from MLX's operations by nan"),
        (two_wrong_rows, r"it differs from MLX's operations by 0\.0"),
        (wrong_zeros, "it differs from MLX's operations by"),
    ],
)
def test_a_faulty_kernel_is_replaced_with_one_warning(
    kernel: Callable[[mx.array, mx.array], object], words: str
) -> None:
    operation = scaling(kernel)
    x, y = normal(1, 1, 1, 1024), normal(2, 1, 1, 1024)
    with pytest.warns(UserWarning, match=words) as caught:
        check(operation, x, y)
        check(operation, x, y)
        check(operation, x[..., :64], y[..., :64])
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("scaling runs without its kernel, slower: on float32[1,1,1024] float32[1,1,1024] it ")
    assert len(message) < 600
    assert "\n" not in message
    assert not operation.serves(Backend.METAL, x, y)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_rounding_is_no_fault(dtype: mx.Dtype) -> None:
    def rounded(x: mx.array, y: mx.array) -> object:
        return (x * y).astype(dtype), mx.zeros_like(x)

    x, y = (normal(key, 1, 1, 4096).astype(dtype) for key in (1, 2))
    operation = scaling(rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(operation, x, y)
    assert operation.serves(Backend.METAL, x, y)


def test_each_case_is_checked_once() -> None:
    calls = []

    def counted(x: mx.array, y: mx.array) -> object:
        calls.append((x.shape[-1], x.dtype))
        return x * y, mx.zeros_like(x)

    compute = scaling(counted).on(Backend.METAL)
    x = normal(1, 1, 1, 64)
    with observe_kernels(SelfCheck(Backend.METAL)):
        for _ in range(3):
            compute(x, x + 1)
            compute(x[..., :32], x[..., :32])
            compute(x.astype(mx.bfloat16), x.astype(mx.bfloat16))
    assert calls == [(64, mx.float32), (32, mx.float32), (64, mx.bfloat16)]
    compute(x, x)
    assert len(calls) == 4


def test_a_reference_without_finite_values_blames_no_kernel() -> None:
    """A damaged checkpoint is not the kernel's fault."""
    x = mx.full((1, 1, 8), float("nan"))
    with warnings.catch_warnings(), observe_kernels(SelfCheck(Backend.METAL)):
        warnings.simplefilter("error")
        scaling(noisy).on(Backend.METAL)(x, x)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda experts, scores: (experts[..., ::-1], scores[..., [3, 2, 1, 0, 4]]), True),
        (lambda experts, scores: (experts[..., ::-1], scores), False),
        (lambda experts, scores: (mx.broadcast_to(experts[..., :1], experts.shape), scores), False),
        (lambda experts, scores: (experts + 2**31, scores), False),
        (lambda experts, scores: (experts, scores[..., [0, 1, 2, 3, 0]]), False),
    ],
    ids=["another order", "scores of others", "one expert", "no experts", "no shared score"],
)
def test_experts_come_in_any_order(
    change: Callable[[mx.array, mx.array], object], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "_kernels", dict(route._kernels))
    route.kernel(Backend.METAL)(lambda *operands: change(*route.reference(*operands)))
    with warnings.catch_warnings(record=True) as caught, observe_kernels(SelfCheck(Backend.METAL)):
        warnings.simplefilter("always")
        route.on(Backend.METAL)(normal(3, 1, 1, 65), 4, True)
    assert [str(warning.message)[:5] for warning in caught] == ([] if passes else ["route"])


def test_a_warning_names_matrices() -> None:
    @Operation
    def product(x: mx.array, matrix: Quantized, factor: int) -> mx.array:
        return x

    @product.kernel(Backend.CUDA)
    def _(x: mx.array, matrix: Quantized, factor: int) -> mx.array:
        return 2 * x

    matrix = quantized(3, 16, 128, 64, 5, mx.bfloat16, 1)
    words = r"on bfloat16\[1,128\] 5-bit/64\[3,16,128\] 7 it differs"
    with pytest.warns(UserWarning, match=words), observe_kernels(SelfCheck(Backend.CUDA)):
        product.on(Backend.CUDA)(mx.ones((1, 128), mx.bfloat16), matrix, 7)
