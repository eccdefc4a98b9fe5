"""load() refuses crafted model folders, and runs none of their code."""

import json
import shutil
from pathlib import Path

import pytest
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import flashmoe_mlx
from tests.checkpoint.hostile.folders import FIRST, FOLDERS, MARKER, first_tensor
from tests.conftest import WriteFamily


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    """A sound folder that a test may damage."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folder_is_refused_with_its_reason(name: str, folder: Path) -> None:
    change, message = FOLDERS[name]
    tensor = first_tensor(folder)
    change(folder)
    with pytest.raises((ValueError, OSError)) as info:
        flashmoe_mlx.load(str(folder))
    assert str(info.value) == message.format(folder=folder, parent=folder.parent, tensor=tensor)
    assert not (folder.parent / MARKER).exists()


def edit(file: Path, **entries: object) -> None:
    """Change a JSON file, and put a module next to it that leaves a marker if it runs."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    marker = file.parent.parent / MARKER
    (file.parent / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nConfig = Model = ModelArgs = Tok = None\n"
    )


def test_auto_map_is_ignored(folder: Path) -> None:
    """Many plain checkpoints have one. mlx-lm has its own class, and nothing runs theirs."""
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    flashmoe_mlx.load(str(folder))
    assert not (folder.parent / MARKER).exists()


def test_tokenizer_that_is_only_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a question at the terminal."""
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"})
    edit(folder / "tokenizer_config.json", tokenizer_class="Tok", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    monkeypatch.setattr(type(TOKENIZER_MAPPING), "__contains__", lambda mapping, config: False)
    with pytest.raises(ValueError, match="custom code"):
        flashmoe_mlx.load(str(folder))
    assert not (folder.parent / MARKER).exists()


def test_trusted_code_runs(folder: Path) -> None:
    """So the tests above would notice."""
    edit(folder / "config.json", model_file="evil.py")
    # Its Model is None.
    with pytest.raises(ValueError, match="from_dict"):
        flashmoe_mlx.load(str(folder), trust_remote_code=True)
    assert (folder.parent / MARKER).exists()


def test_kernel_chosen_by_a_word_is_not_code(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation="flash_attention_2", use_kernels=False)
    flashmoe_mlx.load(str(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_chat_template_runs_in_a_sandbox(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template.replace("MARKER", str(folder.parent / MARKER)))
    _, tokenizer = flashmoe_mlx.load(str(folder))
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert not (folder.parent / MARKER).exists()


def test_links_in_the_hub_cache_are_accepted(folder: Path) -> None:
    """Each file there is a link to ``blobs/<hash>`` of the same repository."""
    snapshot = folder.parent / "models--somebody--model" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    flashmoe_mlx.load(str(snapshot))
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to("../../../secret")
    (snapshot.parent.parent.parent / "secret").write_text("secret")
    with pytest.raises(ValueError, match="outside the model folder"):
        flashmoe_mlx.load(str(snapshot))
