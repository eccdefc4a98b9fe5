"""Digests of experts: what they find, and what other files are told."""

import json
from pathlib import Path

import pytest

from flashmoe_mlx.checkpoint import Checkpoint
from flashmoe_mlx.manifest import Manifest, digest
from tests.conftest import WriteFamily
from tests.disk import content, write_experts


@pytest.fixture
def disk(checkpoint: WriteFamily) -> Checkpoint:
    """A checkpoint to write manifests of."""
    return Checkpoint(checkpoint("qwen3_moe"))


def test_saved_and_loaded(disk: Checkpoint, tmp_path: Path) -> None:
    manifest = Manifest.of(disk)
    manifest.layers["a"] = ["0", "1"]
    manifest.save(tmp_path / "x.json")
    assert Manifest.load(tmp_path / "x.json", disk) == manifest
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_other_checkpoint(disk: Checkpoint, checkpoint: WriteFamily, tmp_path: Path) -> None:
    Manifest.of(disk).save(tmp_path / "x.json")
    other = Checkpoint(checkpoint("qwen3_next"))
    with pytest.raises(ValueError, match=r"is not of .*: model-00001-of-00003\.safetensors is another file"):
        Manifest.load(tmp_path / "x.json", other)


def test_none(disk: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such manifest: "):
        Manifest.load(tmp_path / "x.json", disk)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", "\xff", "[" * 100_000, '{"format": "flashmoe_mlx manifest 1"}']
)
def test_no_manifest(text: str, disk: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match="is no manifest"):
        Manifest.load(tmp_path / "x.json", disk)


def test_later_version(disk: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": "flashmoe_mlx manifest 2"}))
    with pytest.raises(ValueError, match="'flashmoe_mlx manifest 2', and this is 'flashmoe_mlx manifest 1'"):
        Manifest.load(tmp_path / "x.json", disk)


def test_one_bit(tmp_path: Path) -> None:
    table = write_experts(tmp_path / "experts", 1, 2)[0]
    buffers = [memoryview(bytearray(content(0, 1).tobytes()[begin:end])) for begin, end in ((0, 24), (24, 44))]
    manifest = Manifest({}, {"0": ["", digest(table, buffers)]})
    manifest.refuse_damaged(table, 1, buffers)
    for buffer in buffers:
        buffer[7] ^= 1
        with pytest.raises(OSError, match=r"expert 1 of 0, at offset 44 of .*experts, is not what the manifest has"):
            manifest.refuse_damaged(table, 1, buffers)
        buffer[7] ^= 1
    with pytest.raises(OSError, match="has no expert 2 of 0"):
        manifest.refuse_damaged(table, 2, buffers)


def test_digest_stays_what_it_is(tmp_path: Path) -> None:
    """Manifests outlive releases."""
    table = write_experts(tmp_path / "experts", 1, 1)[0]
    data = memoryview(content(0, 0).tobytes())
    assert digest(table, [data[:24], data[24:]]) == "b1d1730011b29e63"
