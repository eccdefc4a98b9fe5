"""The identity of a checkpoint differs if the checkpoint does, and copies have the same headers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.identity import header_identities, model_identity
from tests.conftest import WriteFamily

FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def test_identity_stays_the_same(folder: Path) -> None:
    identity = model_identity(folder, {"experts_per_token": "4"})
    assert len(identity) == 32
    assert model_identity(folder, {"experts_per_token": "4"}) == identity
    assert model_identity(folder, {"experts_per_token": "2"}) != identity


def change_middle(folder: Path) -> None:
    """Change a byte in the sample, and set the time back."""
    file = folder / FIRST
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_time(folder: Path) -> None:
    before = (folder / FIRST).stat()
    os.utime(folder / FIRST, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))


def change_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def note_download(folder: Path) -> None:
    """Leave the note of a download, with another digest."""
    note = folder / ".cache" / "huggingface" / "download" / f"{FIRST}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{'1' * 64}\n")


@pytest.mark.parametrize("change", [change_middle, change_time, change_config, note_download])
def test_identity_changes_with_the_checkpoint(change: Callable[[Path], None], folder: Path) -> None:
    before = model_identity(folder)
    change(folder)
    assert model_identity(folder) != before


def test_copy_has_another_identity_and_the_same_headers(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert model_identity(copy) != model_identity(folder)
    assert header_identities(Checkpoint(copy)) == header_identities(Checkpoint(folder))
