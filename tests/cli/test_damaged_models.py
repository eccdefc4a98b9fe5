"""Every command refuses a model with a damaged file in one line that names the file."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe_mlx import cache_prompt, chat, evaluate, generate, server, verify
from tests.checkpoint.hostile.folders import FOLDERS
from tests.conftest import WriteFamily

COMMANDS: dict[str, Callable[[str, Path], None]] = {
    "generate": lambda model, place: generate.main(["--model", model, "--prompt", "Hi", "--max-tokens", "2"]),
    "chat": lambda model, place: chat.main(["--model", model, "--max-tokens", "2"]),
    "serve": lambda model, place: server.main(["--model", model, "--port", "0"]),
    "evaluate": lambda model, place: evaluate.main(["--model", model, "--text", "README.md"]),
    "cache-prompt": lambda model, place: cache_prompt.main(
        ["--model", model, "--prompt", "Hi", "--prompt-cache-file", str(place / "cache")]
    ),
    "verify": lambda model, place: verify.main([model]),
}
# It does not load the tokenizer.
LOADING = sorted(set(COMMANDS) - {"verify"})


@pytest.fixture
def folder(checkpoint: WriteFamily, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def fail(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: str = "Hi\n"
) -> str:
    """Return the one line that a command ends with."""
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command](str(folder), folder.parent)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "fault",
    ["config.json cut off", "generation_config.json is a list", "width of zero", "model_type that is no model"],
)
def test_a_damaged_config_is_one_line(
    fault: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOLDERS[fault]
    change(folder)
    assert fail(command, folder, monkeypatch, capsys) == message.format(folder=folder)


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize(
    "fault",
    [
        "tokenizer.json is a list",
        "tokenizer.json of a later version",
        "tokenizer_config.json is a list",
        "tool parser that is unknown",
        "chat template with a syntax error",
    ],
)
def test_a_damaged_tokenizer_is_one_line(
    fault: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOLDERS[fault]
    change(folder)
    assert fail(command, folder, monkeypatch, capsys) == message.format(folder=folder)


@pytest.mark.parametrize("command", ["generate", "cache-prompt", "chat"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content + raise_exception('no thanks') }}", "no thanks"),
        ("{{ messages[0].content }}{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[0].content }}{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content }}{% include 'x' %}", "no loader for this environment specified"),
    ],
)
def test_a_chat_template_that_refuses_is_one_line(
    template: str,
    reason: str,
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    error = fail(command, folder, monkeypatch, capsys)
    named = "rejects these messages" if command == "chat" else f"in {folder}/chat_template.jinja rejects this prompt"
    assert error == f"the chat template {named}: {reason}"


@pytest.mark.parametrize("template", ["", "{# nothing #}", "{% if false %}{{ messages }}{% endif %}"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_chat_template_that_makes_nothing_is_one_line(
    command: str, template: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    error = fail(command, folder, monkeypatch, capsys)
    assert "the chat template" in error
    assert "makes" in error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("nowhere", "no such folder: {place}"),
        ("file.txt", "{place} is a file: give the folder that holds config.json and the safetensors"),
        ("model.gguf", "{place} is a GGUF file: get the model in the safetensors format instead"),
        ("empty", "{place} has no config.json: it is not a model folder"),
    ],
)
def test_what_is_not_a_model_is_one_line(
    place: str,
    reason: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "empty").mkdir()
    assert fail(command, tmp_path / place, monkeypatch, capsys) == reason.format(place=tmp_path / place)


def test_an_error_that_nobody_expected_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(generate, "complete", fails)
    assert fail("generate", folder, monkeypatch, capsys) == (
        "unexpected ZeroDivisionError: division by zero. Please report it, with what the same command prints if it "
        "begins with python -X dev -m flashmoe_mlx"
    )
