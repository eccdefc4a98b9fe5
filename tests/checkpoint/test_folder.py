"""Spans of experts, and the messages that bad folders and settings are refused with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

import flashmoe_mlx
from benchmarks.checkpoints import write_checkpoint
from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.config import parse_size
from flashmoe_mlx.model import budget
from tests.conftest import WriteFamily
from tests.support.golden import weights

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("qwen3_5_moe", {"group_size": 64, "bits": 3}),
        ("gpt_oss", {"mode": "mxfp4"}),
        ("nemotron_h", None),
        # MLX computes with it only on GPUs.
        ("qwen3_moe", {"mode": "nvfp4", "global_scale": True}),
    ],
)
def test_spans_hold_the_bytes_of_mlx_lm(
    family: str, quantization: dict[str, Any] | None, checkpoint: WriteFamily
) -> None:
    check_spans(checkpoint(family, quantization))


def test_spans_of_fused_experts_hold_the_bytes_of_mlx_lm(tmp_path: Path) -> None:
    weights.write(tmp_path)
    check_spans(tmp_path)


def check_spans(folder: Path) -> None:
    """Check that every span holds the bytes that mlx-lm gives that expert."""
    model, _ = load_model(folder, lazy=True)
    disk = Checkpoint(folder)
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, (SwitchGLU, SwitchMLP))]
    assert layers
    for path, switch in layers:
        parameters = dict(tree_flatten(switch.parameters()))
        table = ExpertTable.build(disk, path, parameters, lambda stored, name: stored)
        assert [part.name for part in table.parts] == list(parameters)
        for column, array in enumerate(parameters.values()):
            # As words, because Python knows no bfloat16. An expert's nvfp4 scale is a scalar.
            rows = np.asarray(mx.contiguous(array).reshape(table.experts, -1).view(mx.uint8))
            for expert in range(table.experts):
                span = table.spans[expert][column]
                with open(span.path, "rb") as file:
                    file.seek(span.offset)
                    assert file.read(span.nbytes) == rows[expert].tobytes()


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A checkpoint of three files that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def refusal(error: type[Exception], folder: str | Path, **options: Any) -> str:
    """Return the message that load() refuses a folder with, which is one line."""
    with pytest.raises(error) as info:
        flashmoe_mlx.load(str(folder), **options)
    message = str(info.value)
    assert message
    assert "\n" not in message
    return message


def shard(folder: Path, number: int) -> Path:
    """Return one of its files."""
    return sorted(folder.glob("model-*.safetensors"))[number]


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(FileNotFoundError, tmp_path / "nowhere")
    assert "no such folder" in refusal(FileNotFoundError, "nowhere-at-all")


def test_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    message = refusal(NotADirectoryError, shard(folder, 0))
    assert "is a file" in message
    assert "folder" in message


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(OSError, "nobody/no-such-model")
    assert "nobody/no-such-model" in message
    assert "network" in message


def test_malformed_repository_is_refused() -> None:
    assert "no*body/no model" in refusal(OSError, "no*body/no model")


def test_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(FileNotFoundError, folder)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": ', "[]", "7", "null", "{}", '{"model_type": 7}', "\xff"])
def test_damaged_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, "latin-1")
    assert str(folder / "config.json") in refusal(ValueError, folder)


def test_unknown_model_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="perceptron"))
    assert "perceptron" in refusal(ValueError, folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "has no model*.safetensors" in refusal(FileNotFoundError, folder)


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
    }
    write_checkpoint(tmp_path, config)
    assert "mlx_lm.generate" in refusal(ValueError, tmp_path)


def test_missing_shard_is_refused(folder: Path) -> None:
    file = shard(folder, 1)
    file.unlink()
    message = refusal(FileNotFoundError, folder)
    assert file.name in message
    assert "missing" in message


def test_stray_shard_is_refused(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-extra.safetensors"), {"model.extra": mx.zeros(4)})
    message = refusal(ValueError, folder)
    assert "model-extra.safetensors" in message
    assert "model.extra" in message


def test_tensor_not_in_its_shard_is_refused(folder: Path) -> None:
    tensors = mx.load(str(shard(folder, 1)))
    name, _ = tensors.popitem()
    mx.eval(tensors)
    mx.save_safetensors(str(shard(folder, 1)), tensors)
    message = refusal(ValueError, folder)
    assert name in message
    assert shard(folder, 1).name in message


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    name, array = mx.load(str(shard(folder, 1))).popitem()
    mx.save_safetensors(str(folder / "model-again.safetensors"), {name: array})
    message = refusal(ValueError, folder)
    for part in (name, shard(folder, 1).name, "model-again.safetensors"):
        assert part in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', "\xff"])
def test_damaged_index_is_refused(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text, "latin-1")
    assert INDEX in refusal(ValueError, folder)


def test_index_is_optional(folder: Path) -> None:
    (folder / INDEX).unlink()
    flashmoe_mlx.load(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_shard_is_refused(keep: int, folder: Path) -> None:
    file = shard(folder, 2)
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(ValueError, folder)
    assert str(file) in message
    assert "damaged" in message


def garbage(begin: int, data: bytes) -> Callable[[bytes], bytes]:
    """Return a change that overwrites the bytes from ``begin`` on."""
    return lambda old: old[:begin] + data + old[begin + len(data) :]


@pytest.mark.parametrize(
    "change",
    [
        garbage(0, b"\xff" * 8),
        garbage(0, bytes(8)),
        garbage(8, b"not JSON"),
        garbage(8, b"\xff\xfe\xfd"),
        lambda old: old.replace(b'"shape":[', b'"shape":[9', 1),
        lambda old: old.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
        lambda old: old.replace(b'"dtype":"U32"', b'"dtype":"U31"', 1),
        lambda old: old.replace(b'"dtype":"U32"', b'"dtype":"F64"', 1),
        lambda old: b"<!DOCTYPE html><title>404</title>",
    ],
)
def test_damaged_header_is_refused(change: Callable[[bytes], bytes], folder: Path) -> None:
    file = shard(folder, 0)
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    assert str(file) in refusal(ValueError, folder)


def test_experts_of_another_shape_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_experts=8))
    assert "shape" in refusal(ValueError, folder)


@pytest.mark.parametrize("count", [0, -1, 17])
def test_experts_per_token_out_of_range_is_refused(count: int, folder: Path) -> None:
    message = refusal(ValueError, folder, experts_per_token=count)
    assert "experts_per_token" in message
    assert str(count) in message


def test_experts_per_token_of_a_fixed_family_is_refused(checkpoint: WriteFamily) -> None:
    """mlx-lm's Llama 4 always takes one expert."""
    assert "experts_per_token" in refusal(ValueError, checkpoint("llama4"), experts_per_token=2)


def test_config_without_a_size_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["hidden_size"]
    file.write_text(json.dumps(config))
    assert "hidden_size" in refusal(ValueError, folder)


def test_unknown_preset_is_refused(checkpoint: WriteFamily) -> None:
    message = refusal(ValueError, checkpoint("qwen3_5_moe"), config="fastest")
    assert "fastest" in message
    assert "exact" in message
    assert "flash" in message


def test_preset_of_a_family_without_any_is_refused(folder: Path) -> None:
    message = refusal(ValueError, folder, config="exact")
    assert "qwen3_moe" in message
    assert ".toml" in message


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("ram_budgets = 0", ValueError, "ram_budgets"),
        ("sampling = { temperature = 1 }", ValueError, "temperature"),
        ("ram_budget = ", ValueError, "not TOML"),
        ("\xff", ValueError, "not TOML"),
        ("ram_budget = 'much'", ValueError, "much"),
        ("read_threads = 0", ValueError, "read_threads"),
        ("experts_per_token = 'two'", ValueError, "experts_per_token"),
        ("read_threads = 'two'", ValueError, "read_threads"),
        ("sampling = 7", ValueError, "sampling"),
        (None, FileNotFoundError, "no such config file"),
    ],
)
def test_bad_config_file_is_refused(
    text: str | None, error: type[Exception], word: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text, "latin-1")
    assert word in refusal(error, folder, config=file)


@pytest.mark.parametrize("size", ["", "GB", "12 apples", "1e", "-1", "-2GB", "nan", "inf", "1,5GB", "1 2GB", "0x10"])
def test_bad_size_is_refused(size: str, folder: Path) -> None:
    assert repr(size) in refusal(ValueError, folder, ram_budget=size)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (7, 7),
        ("0", 0),
        ("12GB", 12 * 10**9),
        ("12 gb", 12 * 10**9),
        ("11.5GiB", 23 * 2**29),
        ("0.1MB", 10**5),
        ("5k", 5000),
        ("1e3", 1000),
    ],
)
def test_sizes_are_read_with_units(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


def test_budget_above_available_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 10**8)
    message = refusal(MemoryError, folder, ram_budget="1GB")
    assert "ram_budget" in message
    assert "1.00 GB" in message
    assert "0.10 GB" in message


@pytest.mark.parametrize(("free", "fraction"), [(1.0, 0.5), (1.05, 0.5), (1.3, 1), (0.2, 0.1)])
def test_auto_budget_is_all_experts_or_half_the_rest(
    free: float, fraction: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts if a tenth of the memory is left then, else half of what the trunk leaves."""
    model, _ = flashmoe_mlx.load(str(folder))
    trunk, experts = model.streaming.trunk_nbytes, model.streaming.experts_nbytes
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 0)
    monkeypatch.setattr(budget, "available_memory", lambda: trunk + int(experts * free))
    model, _ = flashmoe_mlx.load(str(folder), ram_budget="auto")
    assert model.streaming.slots_nbytes == pytest.approx(experts * fraction, rel=0.1)


def test_trunk_above_available_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    message = refusal(MemoryError, folder)
    assert "trunk" in message
    # Because no budget would help.
    assert "ram_budget" not in message
