"""A layer that is started early runs once, whoever calls it first."""

from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.qwen3_next import swap_trunk
from flashmoe_mlx.layers.shared_expert import Early, make_early
from flashmoe_mlx.layers.switch import StreamedSwitchGLU
from flashmoe_mlx.model.swap import _start_early
from flashmoe_mlx.ops.dispatch import FEW_TOKENS
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, resident, run, streamed


class Counting(nn.Module):
    """Doubles, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return 2 * x


@pytest.fixture
def early() -> Early:
    return make_early(Counting())


X = mx.ones((1, FEW_TOKENS, 4))


def test_started_and_called(early: Early) -> None:
    for calls in (1, 2):
        x = X + calls
        early.start(x)
        assert mx.array_equal(early(x), 2 * x)
        assert early.calls == calls


def test_called_and_started(early: Early) -> None:
    y = early(X)
    early.start(X)
    assert mx.array_equal(y, 2 * X)
    assert early.calls == 1


def test_called_with_something_else(early: Early) -> None:
    early.start(X)
    assert mx.array_equal(early(X + 1), 2 * X + 2)
    assert mx.array_equal(early(X), 2 * X)
    assert early.calls == 3
    early.start(X + 2)  # the block gives it other arrays than the switch layer: no more in vain
    assert early.calls == 3


@pytest.mark.parametrize("lookahead", [False, True])
def test_experts_of_another_width(lookahead: bool, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block projects the experts' input, its router and shared expert want another one."""
    monkeypatch.setitem(FAMILIES, "nemotron_h latent", FAMILIES["nemotron_h"] | {"moe_latent_size": 64})
    folder = checkpoint("nemotron_h latent")
    model = streamed(folder, config=Config(lookahead=lookahead))
    assert_same(run(model, tokens=4), run(resident(folder), tokens=4))


def test_a_prompt_is_not_started(early: Early) -> None:
    early.start(mx.ones((1, FEW_TOKENS + 1, 4)))
    assert early.calls == 0


@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3"])
def test_shared_experts_are_started(family: str, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model each of them is started once a token, and computed once."""
    model = streamed(checkpoint(family))
    layers = [m for _, m in model.named_modules() if isinstance(m, StreamedSwitchGLU)]
    shared = [m for _, m in model.named_modules() if isinstance(m, Early)]
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


def test_where_the_router_begins_it(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of few launches begins its shared expert together with the router, and gives what is left of it."""
    model = streamed(checkpoint("qwen3_5_moe"))
    layers = [m for _, m in model.named_modules() if isinstance(m, StreamedSwitchGLU)]
    swap_trunk(model)
    _start_early(model, layers[0].hidden)
    assert {id(layer.start_early.__self__) for layer in layers} == set(map(id, model.layers))
    launched: list[mx.array] = []
    launch = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda arrays: launched.extend(arrays) or launch(arrays))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[3]]), cache=cache))  # a first token is mlx-lm's
    launched.clear()
    mx.eval(model(mx.array([[5]]), cache=cache))
    assert sum(y.shape == (1, 1, layers[0].hidden) for y in launched) == len(layers)


def test_parameters_keep_their_names(checkpoint: WriteFamily) -> None:
    """Adapters that are attached later find the layers where mlx-lm has them."""
    folder = checkpoint("qwen3_5_moe")
    names = {name for name, _ in tree_flatten(resident(folder).parameters()) if "switch_mlp" not in name}
    assert {name for name, _ in tree_flatten(streamed(folder).parameters())} == names
