"""Planted faults that Apple's compiler refuses and a C++ compiler does not: clang refuses each of them, too."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from tests.msl.generated import Text, generated
from tests.msl.opencl import clang, compiled, pointers_without_address_space

FAULTS = {
    "threadgroup memory as device": ("add_norm", "Shared partial,", "device float* partial,", "no matching function"),
    "constant memory as device": ("add_norm", "Eps eps,", "const device float* eps,", "no matching function"),
    "a cast from device to thread": ("gate_up", "(const device uint4*)", "(const thread uint4*)", "address space"),
    "min of int and uint": ("matvec", "ROWS_ACROSS, rows - 1)", "ROWS_ACROSS, uint(rows - 1))", "ambiguous"),
    "a write to an input": ("add_norm", "sum[start + at + i] =", "y[start] = sum[start + at + i] =", "read-only"),
    "a global that is not constant": (
        "gated_delta",
        "constant constexpr int QUERY",
        "thread int QUERY",
        "address space",
    ),
    "C's name of a function": ("gated_delta", "fabs(a)", "fabsf(a)", "undeclared identifier 'fabsf'"),
    "double": ("gated_delta", "1e-6f", "(double)1e-6f", "double_is_no_type_of_Metal"),
    "a function pointer": (
        "route",
        "largest = max_lanes(largest);",
        "float (*f)(float) = max_lanes; largest = f(largest);",
        "pointers to functions",
    ),
    "an index past an array": (
        "attention_merge",
        "float own[4] = {}",
        "float own[4] = {0, 0, 0, 0, 0}",
        "excess elements",
    ),
}


@pytest.fixture
def text_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Text]:
    """Return a text of a kernel."""
    clang()
    texts = {text.kernel: text for text in generated(monkeypatch, mx.bfloat16)}
    return texts.__getitem__


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault: str, text_of: Callable[[str], Text]) -> None:
    kernel, right, wrong, message = FAULTS[fault]
    text = text_of(kernel)
    mutated = text.source.replace(right, wrong)
    assert mutated != text.source
    good, bad = compiled([text, text._replace(source=mutated)])
    assert good.error == ""
    assert message in bad.error


def test_a_pointer_without_an_address_space_is_found(text_of: Callable[[str], Text]) -> None:
    text = text_of("add_norm")
    mutated = text.source.replace("thread float* own", "float* own")
    assert pointers_without_address_space(text._replace(source=mutated)) == {"__generic float *__private own"}


def test_an_error_names_its_line(text_of: Callable[[str], Text]) -> None:
    text = text_of("route")
    (outcome,) = compiled(
        [text._replace(source=text.source.replace("float gates[PER_LANE];", "flaot gates[PER_LANE];"))]
    )
    assert outcome.error.startswith("kernel:")
    assert outcome.error.endswith("-- flaot gates[PER_LANE];")
