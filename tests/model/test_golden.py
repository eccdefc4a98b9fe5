"""Against Hugging Face transformers, on a checkpoint as it would be uploaded (see golden/make_golden.py)."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.model import budget
from tests.conftest import WriteFamily
from tests.support.golden.weights import TOKENS, write
from tests.support.oracle import distance, streamed

LOGITS = mx.array(np.load(Path(__file__).parents[1] / "support" / "golden" / "qwen3_5_moe.npz")["logits"])


@pytest.fixture(params=[0, 1], ids=["no budget", "all experts"])
def model(
    request: pytest.FixtureRequest, checkpoint: WriteFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> nn.Module:
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 5)
    write(tmp_path)
    for file in checkpoint("qwen3_5_moe").glob("token*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return streamed(tmp_path, request.param)


def test_prefill(model: nn.Module) -> None:
    assert distance(model(mx.array([TOKENS]))[0], LOGITS) < 1e-4


def test_token_by_token(model: nn.Module) -> None:
    cache = make_prompt_cache(model)
    logits = [model(mx.array([[token]]), cache=cache)[0, 0] for token in TOKENS]
    assert distance(mx.stack(logits), LOGITS) < 1e-4
