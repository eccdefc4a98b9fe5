"""Operations run their kernels where these serve, unless a kernel was disabled or is observed."""

from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx.ops.dispatch import Backend, Operation, choose_backend, observe_kernels


@pytest.fixture
def double() -> Operation[[float], str]:
    """An operation whose functions say who computed what. Its Metal kernel serves positive numbers, CUDA's all."""

    @Operation
    def double(x: float) -> str:
        return f"reference {2 * x}"

    @double.kernel(Backend.METAL, serves=lambda x: x > 0)
    def _(x: float) -> str:
        return f"metal {2 * x}"

    @double.kernel(Backend.CUDA)
    def _(x: float) -> str:
        return f"cuda {2 * x}"

    return double


def test_a_kernel_computes_what_it_serves(double: Operation[[float], str]) -> None:
    metal, cuda, reference = map(double.on, (Backend.METAL, Backend.CUDA, Backend.REFERENCE))
    assert (metal(1), metal(-1), cuda(-1), reference(1)) == ("metal 2", "reference -2", "cuda -2", "reference 2")
    assert double.serves(Backend.METAL, 1)
    assert not double.serves(Backend.METAL, -1)
    assert double.serves(Backend.CUDA, -1)
    assert not double.serves(Backend.NATIVE, 1)


def test_a_disabled_kernel_is_replaced_where_it_is_bound_already(double: Operation[[float], str]) -> None:
    metal, cuda = double.on(Backend.METAL), double.on(Backend.CUDA)
    double.disable(Backend.METAL)
    assert (metal(1), double.on(Backend.METAL)(1), cuda(1)) == ("reference 2", "reference 2", "cuda 2")
    assert not double.serves(Backend.METAL, 1)
    double.disable(Backend.NATIVE)


def test_an_observer_computes_what_kernels_serve(double: Operation[[float], str]) -> None:
    def observer(operation: Operation[..., Any], kernel: Any, x: float) -> str:
        return f"{operation.__name__} by {kernel(x)}"

    metal = double.on(Backend.METAL)
    with observe_kernels(observer):
        assert (metal(1), metal(-1)) == ("double by metal 2", "reference -2")
    with pytest.raises(KeyError), observe_kernels(observer):
        raise KeyError
    assert metal(1) == "metal 2"


def test_no_kernels_are_chosen_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (mx.cpu, mx.gpu):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert choose_backend(kernels=False) is Backend.REFERENCE
    assert choose_backend() is not Backend.REFERENCE
