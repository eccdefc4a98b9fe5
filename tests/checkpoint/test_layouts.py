"""Uploads as they come: fused experts, one tensor per expert, and layouts that must be converted first."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

import flashmoe_mlx
from flashmoe_mlx.model import budget
from tests.conftest import WriteFamily
from tests.support.families import FAMILIES
from tests.support.golden import weights
from tests.support.oracle import assert_same, resident, run, streamed
from tests.support.raw import one_tensor_per_expert, read, rewrite, write

SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
MLP = {"fc1": "up_proj", "fc2": "down_proj"}
AFFINE = {"group_size": 64, "bits": 4}

UNSTACKED = [
    ("qwen3_moe", None, SAME),
    ("qwen2_moe", AFFINE, SAME),
    ("mixtral", None, NUMBERED),
    ("mixtral", AFFINE, NUMBERED),
    ("minimax", None, NUMBERED),
    ("lfm2_moe", None, NUMBERED),
    ("nemotron_h", None, MLP),
]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer slots than these tiny models have experts, so that experts are evicted."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 16)


@pytest.mark.parametrize(("family", "quantization", "names"), UNSTACKED)
def test_one_tensor_per_expert_streams(
    family: str, quantization: dict[str, Any] | None, names: dict[str, str], checkpoint: WriteFamily, tmp_path: Path
) -> None:
    change = one_tensor_per_expert(
        r"(?P<parent>.*)\.switch_mlp\.(?P<projection>\w+)\.(?P<kind>\w+)",
        "{parent}.experts.{expert}.{projection}.{kind}",
        names,
    )
    folder = rewrite(checkpoint(family, quantization), tmp_path / "raw", change)
    assert not any("switch_mlp" in name for name in read(folder))
    expected = run(resident(folder), tokens=16)
    assert_same(run(streamed(folder), tokens=16), expected)
    assert_same(run(streamed(folder, 0.25), tokens=16), expected)


@pytest.fixture
def fused(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A Qwen3.5-MoE with gate and up in one tensor of all experts."""
    weights.write(tmp_path)
    for file in checkpoint("qwen3_5_moe").glob("token*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_fused_gate_and_up_streams(fused: Path) -> None:
    expected = run(resident(fused), tokens=16)
    assert_same(run(streamed(fused), tokens=16), expected)
    assert_same(run(streamed(fused, 0.25), tokens=16), expected)


def test_dropped_layers_do_not_replace_the_models_own(fused: Path) -> None:
    """Multi-token-prediction layers count from 0 again, and mlx-lm ignores them."""
    expected = run(resident(fused), tokens=4)
    mtp = {
        name.replace("model.language_model", "mtp"): -array for name, array in read(fused).items() if "layers.0" in name
    }
    (fused / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(fused / "model-mtp.safetensors"), mtp)
    # mlx-lm takes these layers as a sign that norms have to be shifted, which for this layout they have to be anyway.
    assert_same(run(resident(fused), tokens=4), expected)
    assert_same(run(streamed(fused), tokens=4), expected)


def test_interleaved_gate_and_up_must_be_converted(checkpoint: WriteFamily, tmp_path: Path) -> None:
    tensors: dict[str, mx.array] = {}
    source = checkpoint("gpt_oss")
    stored = read(source)
    for name, array in stored.items():
        match = re.fullmatch(r"(.*\.experts)\.(\w+)_proj\.(\w+)", name)
        if match is None:
            tensors[name] = array
            continue
        parent, projection, kind = match.groups()
        if projection == "up":
            continue
        if projection == "gate":
            # Row 2i is the gate's, row 2i + 1 the up projection's.
            axis = 1
            up = stored[f"{parent}.up_proj.{kind}"]
            array = mx.stack([array, up], axis=axis + 1).flatten(axis, axis + 1)
        raw = f"{parent}.{'gate_up' if projection == 'gate' else projection}_proj"
        if kind == "weight":
            tensors[f"{raw}_blocks"] = mx.unflatten(array.view(mx.uint8), -1, (-1, 16))
        else:
            tensors[f"{raw}_{kind}"] = array
    config = FAMILIES["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}
    folder = write(tmp_path / "raw", tensors, config, source)
    # mlx-lm can read it, by moving bytes.
    load_model(folder, lazy=True)
    assert_cannot_stream(folder, "gate_proj.weight")


def test_transposed_weights_must_be_converted(checkpoint: WriteFamily, tmp_path: Path) -> None:
    source = checkpoint("llama4", None)
    stored = read(source)

    def change(name: str, array: mx.array) -> Iterable[tuple[str, mx.array]]:
        parent, _, projection = name.removesuffix("_proj.weight").rpartition(".")
        if not parent.endswith("experts"):
            return [(name, array)]
        if projection == "down":
            return [(f"{parent}.down_proj", array.swapaxes(1, 2))]
        if projection == "up":
            return []
        both = mx.concatenate([array, stored[f"{parent}.up_proj.weight"]], axis=1)
        return [(f"{parent}.gate_up_proj", both.swapaxes(1, 2))]

    folder = rewrite(source, tmp_path / "raw", change)
    load_model(folder, lazy=True)
    assert_cannot_stream(folder, "gate_up_proj")


def assert_cannot_stream(folder: Path, tensor: str) -> None:
    with pytest.raises(ValueError, match=r"mlx_lm\.convert") as error:
        flashmoe_mlx.load(str(folder))
    assert tensor in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
