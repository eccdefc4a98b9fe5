"""Digests of experts find damage, and files that are not manifests of the checkpoint are refused."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import xxhash

import flashmoe_mlx
from flashmoe_mlx import verify
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.manifest import Manifest, digest
from flashmoe_mlx.config import Config
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader
from tests.conftest import WriteFamily
from tests.support.disk import content, write_experts


@pytest.fixture
def disk(checkpoint: WriteFamily) -> Checkpoint:
    """A checkpoint to write manifests of."""
    return Checkpoint(checkpoint("qwen3_moe"))


def test_saved_manifest_loads(disk: Checkpoint, tmp_path: Path) -> None:
    manifest = Manifest.of(disk)
    manifest.layers["a"] = ["0", "1"]
    manifest.save(tmp_path / "x.json")
    assert Manifest.load(tmp_path / "x.json", disk) == manifest
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_file_of_format_2_loads(disk: Checkpoint, tmp_path: Path) -> None:
    """Files outlive releases: sizes, and the XXH3 of headers without the 8 bytes of their length."""
    files = {}
    for path in map(Path, disk.files):
        data = path.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        files[path.name] = [len(data), xxhash.xxh3_64_hexdigest(header)]
    entries = {"format": "flashmoe_mlx manifest 2", "files": files, "layers": {"a": ["0123456789abcdef"]}}
    (tmp_path / "x.json").write_text(json.dumps(entries))
    assert Manifest.load(tmp_path / "x.json", disk).layers == {"a": ["0123456789abcdef"]}


def test_manifest_of_another_checkpoint_is_refused(disk: Checkpoint, checkpoint: WriteFamily, tmp_path: Path) -> None:
    Manifest.of(disk).save(tmp_path / "x.json")
    other = Checkpoint(checkpoint("qwen3_next"))
    with pytest.raises(ValueError, match=r"another checkpoint than .*, model-00001-of-00003\.safetensors differs"):
        Manifest.load(tmp_path / "x.json", other)


def test_missing_manifest_is_refused(disk: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such manifest: "):
        Manifest.load(tmp_path / "x.json", disk)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", "\xff", "[" * 100_000, '{"format": "flashmoe_mlx manifest 2"}']
)
def test_damaged_manifest_is_refused(text: str, disk: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.load(tmp_path / "x.json", disk)


def test_manifest_of_another_format_is_refused(disk: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": "flashmoe_mlx manifest 3"}))
    with pytest.raises(ValueError, match="has the format 'flashmoe_mlx manifest 3', not 'flashmoe_mlx manifest 2'"):
        Manifest.load(tmp_path / "x.json", disk)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    table = write_experts(tmp_path / "experts", 1, 2)[0]
    buffers = [memoryview(bytearray(content(0, 1).tobytes()[begin:end])) for begin, end in ((0, 24), (24, 44))]
    manifest = Manifest({}, {"0": ["", digest(table, buffers)]})
    manifest.refuse_damaged(table, 1, digest(table, buffers))
    for buffer in buffers:
        buffer[7] ^= 1
        with pytest.raises(OSError, match=r"expert 1 of 0, at offset 44 of .*experts, differs from the manifest"):
            manifest.refuse_damaged(table, 1, digest(table, buffers))
        buffer[7] ^= 1
    with pytest.raises(OSError, match="has no expert 2 of 0"):
        manifest.refuse_damaged(table, 2, digest(table, buffers))


def test_digests_do_not_change_between_releases(tmp_path: Path) -> None:
    table = write_experts(tmp_path / "experts", 1, 1)[0]
    data = memoryview(content(0, 0).tobytes())
    assert digest(table, [data[:24], data[24:]]) == "c3a2793d5f95da09"


@pytest.mark.parametrize("ahead", [False, True])
def test_damaged_expert_never_becomes_resident(ahead: bool, tmp_path: Path) -> None:
    """Experts are compared only once, so the second read of an expert needs no digest."""
    file = tmp_path / "experts"
    table = write_experts(file, 1, 4)[0]
    bytes_of = [memoryview(content(0, expert).tobytes()) for expert in range(4)]
    manifest = Manifest({}, {"0": [digest(table, [data[:24], data[24:]]) for data in bytes_of]})
    with file.open("r+b") as opened:
        opened.seek(2 * 44 + 30)
        opened.write(b"!")
    counters = Counters()
    pool = Pool(3, table, Reader([str(file)], 2, counters), counters, None, ManifestCheck(manifest, [table]))
    if ahead:
        pool.prefetch(table, [1, 2], 0)
    with pytest.raises(OSError, match=r"expert 2 of 0, at offset 88 of .*experts, differs from the manifest"):
        pool.fetch(table, [0, 1, 2])
    assert ("0", 2) not in pool.residents
    pool.fetch(table, [0, 1, 3])
    manifest.layers.clear()
    pool.fetch(table, [0, 1])
    assert len(pool.residents) == 3


def test_model_with_a_manifest_has_the_same_output_until_damage(
    checkpoint: WriteFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    file = tmp_path / "x.json"
    verify.main([str(folder), "--write-manifest", str(file), "--sample", "0"])
    prompt = mx.array([[1, 2, 3]])
    model, _ = flashmoe_mlx.load(str(folder))
    checked, _ = flashmoe_mlx.load(str(folder), config=Config(manifest=str(file)))
    assert mx.array_equal(model(prompt), checked(prompt))
    entries = json.loads(file.read_text())
    entries["layers"] = {layer: ["0" * 16] * len(each) for layer, each in entries["layers"].items()}
    file.write_text(json.dumps(entries))
    damaged, _ = flashmoe_mlx.load(str(folder), config=Config(manifest=str(file)))
    with pytest.raises(OSError, match="differs from the manifest"):
        mx.eval(damaged(prompt))
