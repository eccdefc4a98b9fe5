"""Commands whose stdin, stdout or stderr is closed, full, or holds bytes that are no text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WriteFamily

FLASHMOE = f"{sys.executable} -m flashmoe_mlx"
CLOSED = "error: stdout is closed: redirect it to a file, or to /dev/null\n"
FULL = "error: cannot write to stdout: No space left on device\n"
EMPTY = "error: the prompt is empty: --prompt takes a text, or - for stdin\n"
NOT_TEXT = "error: %s is not UTF-8 text, it has the byte 0xff: convert it to UTF-8\n"


def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which FLASHMOE is the command."""
    line = line.replace("FLASHMOE", FLASHMOE)
    # Python writes through if this is set, and then fails at another place.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, env=inherited | environment, check=False
    )


@pytest.fixture(scope="module")
def model(checkpoint: WriteFamily, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shutil.copytree(checkpoint("qwen3_moe"), tmp_path_factory.mktemp("streams") / "model"))


@pytest.mark.parametrize(
    "command", ["--help", "generate --help", "generate --model MODEL --prompt Hi --max-tokens 2", "verify MODEL"]
)
def test_a_closed_stdout_is_one_line(command: str, model: str) -> None:
    ended = run(f"FLASHMOE {command} >&-".replace("MODEL", model))
    assert (ended.returncode, ended.stderr) == (1, CLOSED)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize(
    "command", ["verify MODEL --quick", "generate --model MODEL --prompt Hi --max-tokens 2", "--version"]
)
def test_a_full_disk_is_one_line(command: str, unbuffered: dict[str, str], model: str) -> None:
    ended = run(f"FLASHMOE {command} >/dev/full".replace("MODEL", model), **unbuffered)
    assert (ended.returncode, ended.stderr) == (1, FULL)


@pytest.mark.parametrize("command", ["--help", "verify MODEL --quick", "generate --model MODEL --prompt Hi"])
def test_a_reader_that_has_gone_ends_a_command_silently(command: str, model: str) -> None:
    ended = run(
        f"FLASHMOE {command} | (exec <&-; sleep 3); echo ${{PIPESTATUS[0]}}".replace("MODEL", model),
    )
    assert (ended.stdout, ended.stderr) == ("1\n", "")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("FLASHMOE generate --model MODEL --prompt - --max-tokens 2 <&-", EMPTY),
        ("FLASHMOE generate --model MODEL --prompt - --max-tokens 2 </dev/null", EMPTY),
        ("FLASHMOE generate --model MODEL --prompt '' --max-tokens 2", EMPTY),
        ("FLASHMOE cache-prompt --model MODEL --prompt - --prompt-cache-file MODEL/cache <&-", EMPTY),
    ],
)
def test_an_empty_prompt_is_one_line(line: str, error: str, model: str) -> None:
    ended = run(line.replace("MODEL", model))
    assert (ended.returncode, ended.stderr) == (1, error)


def test_closed_stdin_and_stderr_do_not_matter_to_an_answer(model: str) -> None:
    line = f"FLASHMOE generate --model {model} --prompt Hi --max-tokens 2 --verbose False"
    expected = run(line)
    ended = run(f"{line} <&- 2>&-")
    assert (ended.returncode, ended.stdout) == (0, expected.stdout)
    assert run(f"{line} >&- <&- 2>&-").returncode == 1


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (r"FLASHMOE generate --model MODEL --prompt $'a\xffb'", "--prompt"),
        (r"FLASHMOE generate --model MODEL --prompt Hi --system-prompt $'\xff'", "--system-prompt"),
        (r"FLASHMOE generate --model MODEL --prompt Hi --extra-eos-token $'\xff'", "--extra-eos-token"),
        (r"FLASHMOE generate --model $'MODEL\xff' --prompt Hi", "--model"),
        (r"FLASHMOE verify $'MODEL\xff'", "the model's path"),
        (r"FLASHMOE evaluate --model MODEL --text $'MODEL\xff'", "--text"),
        (r"printf 'a\xffb' | FLASHMOE generate --model MODEL --prompt -", "stdin"),
        (r"printf 'a\xffb' | LC_ALL=C FLASHMOE generate --model MODEL --prompt -", "stdin"),
        (r"printf 'a\xffb' | FLASHMOE cache-prompt --model MODEL --prompt - --prompt-cache-file MODEL/c", "stdin"),
        (r"printf 'a\xffb' | FLASHMOE evaluate --model MODEL --text -", "stdin"),
        (r"printf 'a\xffb\n' | FLASHMOE chat --model MODEL", "stdin"),
    ],
)
def test_bytes_that_are_no_text_are_one_line(line: str, name: str, model: str) -> None:
    ended = run(line.replace("MODEL", model))
    assert (ended.returncode, ended.stderr) == (1, NOT_TEXT % name)


@pytest.mark.parametrize("text", [r"What is a heron?", r"\x00", r"\xe2\x82\xac"])
def test_a_byte_order_mark_is_not_part_of_the_question(text: str, model: str) -> None:
    line = f"FLASHMOE generate --model {model} --prompt - --max-tokens 8 --verbose False"
    expected = run(f"printf '{text}' | {line}")
    assert expected.returncode == 0
    ended = run(rf"printf '\xef\xbb\xbf{text}' | {line}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, expected.stdout, "")
