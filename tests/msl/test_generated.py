"""Every Metal text that MLX generates compiles, with address spaces, in the registers that Apple's GPUs have."""

import mlx.core as mx
import pytest

from flashmoe_mlx.ops.dispatch import Backend
from tests.msl.generated import DTYPES, generated
from tests.msl.opencl import clang, compiled, pointers_without_address_space
from tests.msl.registers import APPLE_REGISTERS, max_threads, over_budget, table

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
KERNELS = {
    *("add_norm", "attention_merge", "attention_split", "combine", "gate_up", "gated_delta"),
    *("matvec", "norm_rope", "route", "router_and_shared"),
}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["each", "all"])
@EACH_DTYPE
def test_texts_compile_within_apples_registers(dtype: mx.Dtype, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clang()
    texts = generated(monkeypatch, dtype, whole=whole)
    assert {text.kernel for text in texts} == KERNELS
    outcomes = compiled(texts)
    failed = [f"{text}: {outcome.error}" for text, outcome in zip(texts, outcomes, strict=True) if outcome.error]
    assert not failed, "\n".join(failed)
    print(f"\n{DTYPES[dtype]}: {len(texts)} texts\n{table(texts, outcomes)}")
    over = [over_budget(*each) for each in zip(texts, outcomes, strict=True)]
    assert not any(over), "\n".join(filter(None, over))


@EACH_DTYPE
def test_every_pointer_has_an_address_space(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    clang()
    one_each = {text.kernel: text for text in generated(monkeypatch, dtype)}
    found = {f"{name}: {each}" for name, text in one_each.items() for each in pointers_without_address_space(text)}
    assert found == set()


def test_cudas_launches_are_over_apples_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clang()
    texts = generated(monkeypatch, mx.bfloat16, backend=Backend.CUDA)
    over = [text.kernel for text, outcome in zip(texts, compiled(texts), strict=True) if over_budget(text, outcome)]
    assert set(over) == {"attention_split", "combine", "matvec"}


def test_threads_by_registers() -> None:
    assert [max_threads(count) for count in (52, 53, 104, 105, APPLE_REGISTERS, 129)] == [1024, 896, 512, 448, 384, 0]
