"""The commands give mlx-lm chunks that fit the prompt at hand."""

from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx import cache_prompt, generate
from flashmoe_mlx.evaluation import tasks
from flashmoe_mlx.evaluation.tasks import Task
from flashmoe_mlx.model import info
from tests.conftest import WriteFamily
from tests.support.oracle import streamed

# In the tests' vocabulary more than 600 tokens.
LONG = "heron " * 700


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that reach mlx-lm, where there is only room for the scores of 64 tokens and any prompt."""
    seen: list[int] = []

    def record(*_: Any, prefill_step_size: int, **__: Any) -> Any:
        seen.append(prefill_step_size)
        return ""

    monkeypatch.setattr(mlx_lm, "generate", record)
    monkeypatch.setattr(cache_prompt, "generate_step", record)
    monkeypatch.setattr(info, "available_memory", lambda: 0)
    monkeypatch.setattr(info, "memory_reserve", lambda: 0)
    return seen


@pytest.mark.parametrize(("flags", "size"), [([], 64), (["--prefill-step-size", "200"], 50)])
def test_generate_and_cache_prompt(
    flags: list[str], size: int, checkpoint: WriteFamily, sizes: list[int], tmp_path: Path
) -> None:
    common = ["--model", str(checkpoint("qwen3_moe")), "--prompt", LONG, *flags]
    generate.main(common)
    cache_prompt.main([*common, "--prompt-cache-file", str(tmp_path / "long")])
    assert sizes == [size, size]


def test_tasks(checkpoint: WriteFamily, sizes: list[int]) -> None:
    folder = checkpoint("qwen3_moe")
    messages = [{"role": "user", "content": LONG}]
    tasks.answer(streamed(folder), load_tokenizer(folder), Task(messages, None, ""), 4)
    assert sizes == [64]
