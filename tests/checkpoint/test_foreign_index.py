"""An index of another checkpoint beside a model's files, as uploads of converted models have it."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import flashmoe_mlx
from flashmoe_mlx.checkpoint.folder import INDEX, Checkpoint
from flashmoe_mlx.model.load import _note_foreign_index
from tests.conftest import WriteFamily


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A checkpoint of three files that a test may change."""
    _note_foreign_index.cache_clear()
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def index(folder: Path, shards: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": shards}))


def _of_the_original(folder: Path) -> None:
    """Each expert on its own, nothing quantized, in 80 files."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(2):
        names += [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo"]
        names += [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for expert in range(16)]
    index(folder, {name: f"model-{number % 80 + 1:05}-of-00080.safetensors" for number, name in enumerate(names)})


def _of_as_many_files(folder: Path) -> None:
    """The original happens to have files of the same names."""
    _of_the_original(folder)
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    index(folder, {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(shards)})


def _of_joined_files(folder: Path) -> None:
    """The model's own index, from before its files were made one."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= mx.load(str(file))
        mx.eval(tensors)
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


@pytest.mark.parametrize("change", [_of_the_original, _of_as_many_files, _of_joined_files])
def test_files_that_are_whole_are_used_and_the_log_says_so(
    change: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder)
    with caplog.at_level(logging.WARNING):
        flashmoe_mlx.load(str(folder))
        flashmoe_mlx.load(str(folder))
    assert caplog.messages == [
        f"{folder / INDEX} belongs to another checkpoint, and is ignored: the model's files have all that it needs"
    ]


@pytest.mark.parametrize("change", [_of_the_original, _of_as_many_files])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_files_that_are_not_whole_are_refused(number: int, change: Callable[[Path], None], folder: Path) -> None:
    change(folder)
    (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"[Mm]issing.*{INDEX} belongs to another checkpoint") as info:
        flashmoe_mlx.load(str(folder))
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize("missing", [(1,), (2,), (3,), (1, 2), (2, 3)])
def test_a_missing_file_of_its_own_index_is_named(missing: tuple[int, ...], folder: Path) -> None:
    """Even if most files are missing, the index is known by those that are there."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in missing]
    for name in names:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{names[0]} is in the index but missing: download it again"):
        flashmoe_mlx.load(str(folder))


def test_a_tensor_in_the_wrong_file_does_not_make_an_index_foreign(folder: Path) -> None:
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    name = min(shards)
    index(folder, shards | {name: next(shard for shard in shards.values() if shard != shards[name])})
    with pytest.raises(ValueError, match=f"{name} is not in"):
        Checkpoint(folder)


def test_an_empty_index_says_nothing(folder: Path) -> None:
    index(folder, {})
    assert not Checkpoint(folder).foreign_index
    flashmoe_mlx.load(str(folder))


def test_a_foreign_index_may_name_no_file_elsewhere(folder: Path) -> None:
    index(folder, {"model.norm.weight": "../model.safetensors"})
    with pytest.raises(ValueError, match="may only name files in its own folder"):
        Checkpoint(folder)
