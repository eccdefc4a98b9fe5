"""Memory is wired once per load on Metal, and not at each request."""

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import utils as mlx_lm_utils

from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.model import load as load_module
from flashmoe_mlx.model import wiring
from flashmoe_mlx.system import metal
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, mlx_lm_model

RECOMMENDED = 36 * 10**9


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The wired limits that are set on a machine that says it computes on Metal."""
    module = __import__("mlx_lm.generate", fromlist=["wired_limit"])
    recorded: list[int] = []
    monkeypatch.setattr(module, "wired_limit", module.wired_limit)
    wiring._keep_limit.cache_clear()
    for each in (wiring, metal):
        monkeypatch.setattr(each, "computes_on_metal", lambda: True)
    info = {"max_recommended_working_set_size": RECOMMENDED, "architecture": "applegpu_g16s"}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    before = [0]

    def set_wired_limit(limit: int) -> int:
        recorded.append(limit)
        before.append(limit)
        return before[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    yield recorded
    wiring._keep_limit.cache_clear()


def test_once_per_load_and_not_per_request(limits: list[int], checkpoint: WriteFamily) -> None:
    folder = str(checkpoint("qwen3_5_moe"))
    model, tokenizer = load_module.load(folder, ram_budget="1GB")
    [limit] = limits
    streaming = model.streaming
    held = streaming.trunk_nbytes + streaming.slots_nbytes
    room = 32_768 * streaming.kv_token_nbytes
    assert held + room <= limit <= max(held, mx.get_active_memory()) + room
    generator = Generator(model, tokenizer, PrefixCache())
    for _ in range(2):
        mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=2)
        list(generator.decode(generator.prefill(PROMPT, {}), 2))
    assert limits == [limit]


def test_a_trunk_that_is_not_read_yet_counts(limits: list[int], checkpoint: WriteFamily) -> None:
    streaming = load_module.load(str(checkpoint("qwen3_5_moe")), lazy=True)[0].streaming
    assert limits[0] >= streaming.trunk_nbytes + streaming.slots_nbytes


def test_other_models_are_wired_as_mlx_lm_does(
    limits: list[int], checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    _, tokenizer = load_module.load(str(folder))
    [limit] = limits
    monkeypatch.setattr(mlx_lm_utils.mx, "device_info", lambda: {"max_recommended_working_set_size": RECOMMENDED})
    mlx_lm.generate(mlx_lm_model(folder), tokenizer, PROMPT, max_tokens=2)
    assert limits == [limit, RECOMMENDED, limit]


def test_nothing_is_wired_elsewhere(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail(f"wired {limit}"))
    load_module.load(str(checkpoint("qwen3_moe")))
