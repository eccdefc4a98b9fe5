"""The verify command: its output for valid models, and the damage that it finds."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.hf_api import RepoFile

from flashmoe_mlx import verify
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.manifest import Manifest
from tests.conftest import WriteFamily

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command: exit code, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            verify.main([str(argument) for argument in argv])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    """Return its safetensors files."""
    return sorted(folder.glob("model-*.safetensors"))


def flip(file: Path, offset: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def expert_offset(folder: Path) -> tuple[Path, int]:
    """Return the file and offset of a byte of an expert."""
    tensor = next(tensor for name, tensor in sorted(Checkpoint(folder).tensors.items()) if "switch_mlp" in name)
    return Path(tensor.span.path), tensor.span.offset + tensor.span.nbytes // 2


def as_download(folder: Path) -> None:
    """Write what ``hf download --local-dir`` writes next to the files."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for file in shards(folder):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (notes / f"{file.name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1764055184.0\n")
    config = (folder / "config.json").read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    (notes / "config.json.metadata").write_text(f"{'0' * 40}\n{digest}\n1764055184.0\n")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_valid_model_passes(family: str, checkpoint: WriteFamily, run: Run) -> None:
    code, out, err = run(checkpoint(family))
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["headers", "experts", "sample"]


def test_quick_reads_headers_only(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "Reader", lambda *_: pytest.fail("it reads more than headers"))
    code, out, _ = run(folder, "--quick")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == ["headers", "experts"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--quick", "--sha256"], "--quick"),
        (["--sample", -1], "--sample is -1: it must be a non-negative integer"),
        (["--write-manifest", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--manifest", "/no/such/folder/x.json"], "no such manifest"),
        (["--sha256"], "--repo"),
    ],
)
def test_impossible_flags_are_refused(flags: list[object], word: str, folder: Path, run: Run) -> None:
    code, _, err = run(folder, *flags)
    assert code == 1
    assert word in err
    assert err.count("\n") == 1


def test_a_damaged_header_is_found(folder: Path, run: Run) -> None:
    flip(shards(folder)[1], 8)
    code, _, err = run(folder, "--quick")
    assert code == 1
    assert f"{shards(folder)[1]} is damaged or not complete: its header does not begin with {{" in err


def test_a_sample_that_differs_is_found(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_read", lambda _, table, experts: [[memoryview(b"") for _ in table.parts]])
    code, _, err = run(folder)
    assert code == 1
    assert "differs from what MLX reads" in err


def test_a_download_is_compared_with_its_digests(folder: Path, run: Run) -> None:
    as_download(folder)
    code, out, _ = run(folder, "--sha256")
    assert code == 0
    assert "SHA-256: matches what the hub published, 4 files" in out
    flip(shards(folder)[2], -1)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    code, _, err = run(folder, "--sha256")
    assert (code, err) == (
        1,
        f"error: {folder}: config.json, {shards(folder)[2].name} differ from what the hub published. Download again\n",
    )


def test_the_hub_cache_is_compared_with_its_digests(folder: Path, run: Run) -> None:
    snapshot = folder.parent / "models--somebody--model" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blobs / digest)
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    assert run(snapshot, "--sha256")[0] == 0
    flip(shards(snapshot)[0].resolve(), -1)
    assert f"{shards(snapshot)[0].name} differ" in run(snapshot, "--sha256")[2]


def test_a_folder_is_compared_with_a_repository(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: Any, repo: str, names: list[str], revision: str | None) -> list[Any]:
        assert (repo, revision) == ("somebody/model", "main")
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        digests[shards(folder)[1].name] = "0" * 64
        return [
            RepoFile(path=name, size=1, oid="", lfs={"size": 1, "oid": digest, "pointerSize": 1, "sha256": digest})
            for name, digest in digests.items()
        ]

    monkeypatch.setattr("flashmoe_mlx.checkpoint.hub_digests.HfApi.get_paths_info", answer)
    code, _, err = run(folder, "--sha256", "--repo", "somebody/model", "--revision", "main")
    assert code == 1
    assert f"{shards(folder)[1].name} differ from what the hub published" in err


def test_a_hub_that_cannot_be_reached_is_an_error(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run(folder, "--repo", "somebody/model")
    assert code == 1
    assert "somebody/model" in err
    assert "network" in err


def test_a_manifest_finds_a_changed_expert(folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    before = sorted(folder.rglob("*"))
    assert run(folder, "--write-manifest", file)[0] == 0
    # Nothing is written into the model's folder.
    assert sorted(folder.rglob("*")) == before
    code, out, _ = run(folder, "--manifest", file)
    assert code == 0
    assert f"manifest: matches {file}, " in out
    flip(*expert_offset(folder))
    code, _, err = run(folder, "--manifest", file)
    assert code == 1
    assert "differs from the manifest: the file was damaged or changed" in err


def test_an_interrupted_manifest_is_completed(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = tmp_path / "whole.json", tmp_path / "x.json"
    run(folder, "--write-manifest", whole)
    save = Manifest.save

    def save_and_stop(manifest: Manifest, path: Path) -> None:
        save(manifest, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", save_and_stop)
        assert run(folder, "--write-manifest", file)[0] == 130
    assert len(json.loads(file.read_text())["layers"]) == 1
    layers = len(json.loads(whole.read_text())["layers"])
    code, out, _ = run(folder, "--write-manifest", file)
    assert code == 0
    assert f"{layers - 1} layer new" in out
    assert json.loads(file.read_text()) == json.loads(whole.read_text())


def test_a_manifest_of_replaced_files_is_refused(folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    run(folder, "--write-manifest", file)
    entries = json.loads(file.read_text())
    entries["files"][shards(folder)[0].name][0] += 1
    file.write_text(json.dumps(entries))
    for flag in ("--manifest", "--write-manifest"):
        code, _, err = run(folder, flag, file)
        assert code == 1
        assert f"{shards(folder)[0].name} differs" in err


def test_a_model_with_code_is_refused(folder: Path, run: Run) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    code, _, err = run(folder, "--quick")
    assert code == 1
    assert "asks for code to be run" in err


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify.main(["--help"])
    assert "--write-manifest" in capsys.readouterr().out
