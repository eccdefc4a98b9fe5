"""A module that is started early runs once, in whatever order it is started and called."""

from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.decode_step import MAX_TOKENS
from flashmoe_mlx.layers.fused_decoder import FusedDecoderLayer
from flashmoe_mlx.layers.shared_expert import OverlappedModule, overlap
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.native import Kernels
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, mlx_lm_model, resident, run, streamed


class Counting(nn.Module):
    """Doubles its input, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return 2 * x


@pytest.fixture
def early() -> OverlappedModule:
    return overlap(Counting())


X = mx.ones((1, MAX_TOKENS, 4))


def test_a_call_takes_the_started_output(early: OverlappedModule) -> None:
    for calls in (1, 2):
        x = X + calls
        early.start(x)
        assert mx.array_equal(early(x), 2 * x)
        assert early.calls == calls


def test_a_start_after_the_call_computes_nothing(early: OverlappedModule) -> None:
    y = early(X)
    early.start(X)
    assert mx.array_equal(y, 2 * X)
    assert early.calls == 1


def test_another_input_is_computed_anew(early: OverlappedModule) -> None:
    early.start(X)
    assert mx.array_equal(early(X + 1), 2 * X + 2)
    assert mx.array_equal(early(X), 2 * X)
    assert early.calls == 3
    # The block gives it other arrays than the switch layer, so starting it would be in vain.
    early.start(X + 2)
    assert early.calls == 3


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_block_may_project_its_experts_input(
    lookahead: bool, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its router and shared expert need another input than the experts."""
    monkeypatch.setitem(FAMILIES, "nemotron_h latent", FAMILIES["nemotron_h"] | {"moe_latent_size": 64})
    folder = checkpoint("nemotron_h latent")
    model = streamed(folder, config=Config(lookahead=lookahead))
    assert_same(run(model, tokens=4), run(resident(folder), tokens=4))


def test_a_prompt_is_not_started(early: OverlappedModule) -> None:
    early.start(mx.ones((1, MAX_TOKENS + 1, 4)))
    assert early.calls == 0


@pytest.mark.parametrize("backend", [Backend.REFERENCE], ids=["reference"], indirect=True)
@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3"])
def test_a_shared_expert_is_started_and_computed_once_a_token(
    family: str, backend: Backend, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(checkpoint(family))
    layers = [m for _, m in model.named_modules() if isinstance(m, StreamedSwitchGLU)]
    shared = [m for _, m in model.named_modules() if isinstance(m, OverlappedModule)]
    assert 0 < len(shared) == len(layers)
    computed: list[mx.array] = []
    launched: list[mx.array] = []
    kind = type(shared[0]).__bases__[1]
    call, launch = kind.__call__, mx.async_eval
    monkeypatch.setattr(kind, "__call__", lambda self, x: computed.append(call(self, x)) or computed[-1])
    monkeypatch.setattr(
        mx,
        "async_eval",
        lambda *arrays: (
            launched.extend(chain(*(each if isinstance(each, list) else [each] for each in arrays))) or launch(*arrays)
        ),
    )
    mx.eval(model(mx.array([[3]])))
    started = [y for y in launched if any(y is each for each in computed)]
    assert len(started) == len(shared)


def test_a_fused_layer_launches_its_shared_expert_with_the_resident_experts(
    checkpoint: WriteFamily, native: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(checkpoint("qwen3_5_moe"))
    assert all(isinstance(layer, FusedDecoderLayer) for layer in model.layers)
    layers = [m for _, m in model.named_modules() if isinstance(m, StreamedSwitchGLU)]
    cache = make_prompt_cache(model)
    # Fused steps need a state to continue.
    mx.eval(model(mx.array([[3]]), cache=cache))
    launched: list[mx.array] = []
    launch = mx.async_eval
    monkeypatch.setattr(
        mx, "async_eval", lambda *each: launched.extend(each[0] if isinstance(each[0], list) else each) or launch(*each)
    )
    mx.eval(model(mx.array([[5]]), cache=cache))
    assert sum(y.shape == (1, 1, layers[0].hidden) for y in launched) == len(layers)


def test_parameters_keep_mlx_lms_names(checkpoint: WriteFamily) -> None:
    """Adapters that are attached later find the layers where mlx-lm has them."""
    folder = checkpoint("qwen3_5_moe")
    names = {name for name, _ in tree_flatten(mlx_lm_model(folder).parameters()) if "switch_mlp" not in name}
    assert {name for name, _ in tree_flatten(streamed(folder).parameters())} == names
