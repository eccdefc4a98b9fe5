"""Chat templates from a flag: a file, or the template itself."""

from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx import server
from flashmoe_mlx.cli.chat_template import read_chat_template, render
from tests.conftest import WriteFamily

TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.mark.parametrize("name", ["mine.jinja", "mine", "a {b}.txt"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_is_read(name: str, mark: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(mark + TEMPLATE.encode())
    assert read_chat_template(str(file)) == TEMPLATE


@pytest.mark.parametrize("text", [TEMPLATE, "{{ 1 }}", "Hi { there", TEMPLATE * 1000])
def test_text_with_braces_is_a_template(text: str) -> None:
    assert read_chat_template(text) == text


@pytest.mark.parametrize("name", ["nowhere.jinja", "", "/nowhere/at/all", "a template without braces"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises((FileNotFoundError, IsADirectoryError)) as info:
        read_chat_template(name)
    assert "\n" not in str(info.value)


def test_a_folder_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_chat_template(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"{{ 1 }}\xe9")
    with pytest.raises(ValueError, match="latin is not UTF-8 text, it has the byte 0xe9"):
        read_chat_template(str(tmp_path / "latin"))


def test_the_server_renders_with_the_file(checkpoint: WriteFamily, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    argv = ["--model", "x", "--chat-template", str(tmp_path / "mine.jinja")]
    options = server._load_options(server.setup_arg_parser().parse_args(argv))
    tokenizer = load_tokenizer(checkpoint("qwen3_moe"), options["tokenizer_config"])
    assert render(tokenizer, [{"role": "user", "content": "Hi"}], tokenize=False) == "[Hi]"


@pytest.mark.parametrize("argument", ["{% if %}", "{{ 1", "{% for x in y %}"])
def test_a_damaged_template_is_refused_at_the_start(
    argument: str, checkpoint: WriteFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        server.main(["--model", str(checkpoint("qwen3_moe")), "--port", "0", "--chat-template", argument])
    error = capsys.readouterr().err
    assert error.startswith("error: --chat-template: the chat template has a syntax error (line 1: ")
    assert error.count("\n") == 1
