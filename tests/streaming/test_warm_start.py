"""Experts that were resident at the end of a run are resident at the beginning of the next."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from flashmoe_mlx.config import Config
from flashmoe_mlx.streaming.warm_start import save_residents
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, assert_same, resident, run, streamed


def residents(model: nn.Module) -> list[list[tuple[str, int]]]:
    return [pool.residents for pool in model.streaming.pools]


# A pool for each layer, and one for all.
@pytest.mark.parametrize("fraction", [0.5, 0])
def test_residents_are_those_of_the_last_run(fraction: float, checkpoint: WriteFamily, tmp_path: Path) -> None:
    folder, file = checkpoint("qwen3_5_moe"), str(tmp_path / "residents.json")
    # There is no file yet, which is not an error.
    first = streamed(folder, fraction, config=Config(warm_start=file))
    run(first, PROMPT, tokens=4)
    first.streaming.save_residents(file)
    second = streamed(folder, fraction, config=Config(warm_start=file))
    assert [set(each) for each in residents(second)] == [set(each) for each in residents(first)]
    assert residents(first)[0]
    assert second.streaming.counters.misses == 0
    assert_same(run(second, tokens=8), run(resident(folder), tokens=8))


def test_smaller_budget_keeps_the_most_recently_used(checkpoint: WriteFamily, tmp_path: Path) -> None:
    folder, file = checkpoint("qwen3_5_moe"), str(tmp_path / "residents.json")
    first = streamed(folder, 0.75)
    run(first, tokens=4)
    first.streaming.save_residents(file)
    second = streamed(folder, 0.5, config=Config(warm_start=file))
    for before, after in zip(residents(first), residents(second), strict=True):
        assert after == before[-len(after) :]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"experts": 3}', '{"experts": {"a": ["1"]}}', '{"experts": {"a": [1.5]}}', "\0"]
)
def test_damaged_file_is_refused(text: str, checkpoint: WriteFamily, tmp_path: Path) -> None:
    file = tmp_path / "residents.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="delete it, and it will be recreated"):
        streamed(checkpoint("qwen3_5_moe"), config=Config(warm_start=str(file)))


def test_missing_folder_is_refused_before_the_run(checkpoint: WriteFamily, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing for the warm-start file"):
        streamed(checkpoint("qwen3_5_moe"), config=Config(warm_start=str(tmp_path / "missing" / "residents.json")))


def test_file_of_another_model_is_refused(checkpoint: WriteFamily, tmp_path: Path) -> None:
    file = tmp_path / "residents.json"
    model = streamed(checkpoint("qwen3_5_moe"))
    model(mx.array([[1]]))
    model.streaming.save_residents(file)
    experts = json.loads(file.read_text())["experts"]
    file.write_text(json.dumps({"experts": {layer: [1000] for layer in experts}}))
    with pytest.raises(ValueError, match="is of another model: it has expert 1000 of"):
        streamed(checkpoint("qwen3_5_moe"), config=Config(warm_start=str(file)))


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "residents.json"
    save_residents(file, [])
    before = file.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        save_residents(file, [])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
