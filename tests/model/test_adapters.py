"""LoRA adapters: those of the trunk work, those of experts are refused before the model runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

import flashmoe_mlx
from tests.conftest import WriteFamily
from tests.support.oracle import resident

PARAMETERS = {"rank": 2, "scale": 4.0, "dropout": 0.0}
WAY_OUT = (
    "experts cannot have adapters here, because they stay on disk as they are, and {folder} has some: leave {keys} out "
    "of the keys of its lora_parameters and train again, or make one checkpoint of both with mlx_lm.fuse "
    "--adapter-path {folder}"
)


def write(folder: Path, model: nn.Module, keys: list[str] | None, **config: Any) -> Path:
    """Write random adapters as mlx_lm.lora does."""
    folder.mkdir()
    parameters = PARAMETERS if keys is None else PARAMETERS | {"keys": keys}
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    mx.random.seed(7)
    tensors = {name: mx.random.normal(array.shape) for name, array in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"num_layers": 2, "lora_parameters": parameters, "fine_tune_type": "lora"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "keys", "refused"),
    [
        ("qwen3_moe", None, ["down_proj", "gate_proj", "up_proj"]),
        ("qwen3_moe", ["self_attn.q_proj", "mlp.switch_mlp.gate_proj"], ["gate_proj"]),
        ("qwen3_moe", ["model.layers.1.mlp.switch_mlp.up_proj"], ["up_proj"]),
        ("qwen3_5_moe", ["mlp.switch_mlp.down_proj", "mlp.switch_mlp.up_proj"], ["down_proj", "up_proj"]),
    ],
)
@pytest.mark.parametrize("ram_budget", [0, "1GB"])
def test_adapters_of_experts_are_refused_before_the_model_runs(
    ram_budget: int | str,
    family: str,
    keys: list[str] | None,
    refused: list[str],
    checkpoint: WriteFamily,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(tmp_path / "adapters", load_model(checkpoint(family), lazy=True)[0], keys)
    monkeypatch.setattr("flashmoe_mlx.model.load.stream_experts", lambda *_: pytest.fail("experts were prepared"))
    with pytest.raises(ValueError, match="experts cannot have adapters here") as info:
        flashmoe_mlx.load(str(checkpoint(family)), adapter_path=str(folder), ram_budget=ram_budget)
    names = ", ".join(f"mlp.switch_mlp.{name}" for name in refused)
    assert str(info.value) == WAY_OUT.format(folder=folder, keys=names)


@pytest.mark.parametrize("keys", [["self_attn.q_proj", "self_attn.o_proj"], ["mlp.gate"], ["self_attn.v_proj"]])
def test_adapters_of_the_trunk_work(keys: list[str], checkpoint: WriteFamily, tmp_path: Path) -> None:
    expected = resident(checkpoint("qwen3_moe"))
    folder = write(tmp_path / "adapters", load_model(checkpoint("qwen3_moe"), lazy=True)[0], keys)
    linear_to_lora_layers(expected, 2, PARAMETERS | {"keys": keys})
    expected.load_weights(str(folder / "adapters.safetensors"), strict=False)
    plain, _ = flashmoe_mlx.load(str(checkpoint("qwen3_moe")))
    adapted, _ = flashmoe_mlx.load(str(checkpoint("qwen3_moe")), adapter_path=str(folder))
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(adapted(tokens), expected(tokens), atol=1e-4, rtol=1e-4)
    assert not mx.allclose(plain(tokens), expected(tokens), atol=1e-4, rtol=1e-4)


def _config(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_config("[]"), "adapter_config.json is damaged (it is not a JSON object)"),
        (_config('{"num_layers":'), "adapter_config.json is damaged (Expecting value"),
        (_config('{"peft_type": "LORA"}'), "adapter_config.json is of PEFT, and mlx-lm reads only adapters"),
        (_config("{}"), "has no attribute 'num_layers'"),
        (_config('{"num_layers": 2, "lora_parameters": {"rank": 2, "alpha": 4}}'), "missing required key 'scale'"),
        (_config('{"num_layers": 2, "lora_parameters": 7}'), "mlx-lm cannot apply the adapters of"),
        (lambda folder: (folder / "adapters.safetensors").write_bytes(b"x"), "adapters.safetensors is damaged"),
        (lambda folder: (folder / "adapters.safetensors").unlink(), "has no adapters.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    change: Callable[[Path], Any], words: str, checkpoint: WriteFamily, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapters", load_model(checkpoint("qwen3_moe"), lazy=True)[0], ["self_attn.q_proj"])
    change(folder)
    with pytest.raises((ValueError, OSError)) as info:
        flashmoe_mlx.load(str(checkpoint("qwen3_moe")), adapter_path=str(folder))
    assert words in str(info.value)
    assert str(folder) in str(info.value)
    assert "\n" not in str(info.value)


def test_adapters_of_another_model_are_refused(checkpoint: WriteFamily, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapters", load_model(checkpoint("qwen3_5_moe"), lazy=True)[0], ["self_attn.q_proj"])
    with pytest.raises(ValueError, match="are they of this model, and complete"):
        flashmoe_mlx.load(str(checkpoint("qwen3_moe")), adapter_path=str(folder))
