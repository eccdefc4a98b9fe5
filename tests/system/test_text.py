"""Text of files, of stdin and of arguments."""

import io
import json
from pathlib import Path

import pytest

from flashmoe_mlx.evaluation.tasks import read_tasks
from flashmoe_mlx.system.atomic_write import replacing
from flashmoe_mlx.system.text import brief, check_text, read_stdin, read_text, stdin_lines

TASK = {"messages": [{"role": "user", "content": "What is a heron?"}], "expect": "a bird"}


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, errors: str = "strict") -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))


@pytest.mark.parametrize("text", ["", "a", "\u20ac\n", "a\n\ufeffb\n"])
def test_a_byte_order_mark_at_the_start_is_not_part_of_a_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(text, encoding="utf-8-sig")
    assert read_text(tmp_path / "text") == text
    stdin(monkeypatch, text.encode("utf-8-sig"))
    assert read_stdin() == text
    stdin(monkeypatch, text.encode())
    assert list(stdin_lines()) == text.splitlines(keepends=True)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("data", [b"\xe9", b"a\nb\xe9", b"\xe9\xff"])
def test_bytes_that_are_no_text_are_named(
    data: bytes, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, data, errors)
    with pytest.raises(ValueError, match=r"^stdin is not UTF-8 text, it has the byte 0xe9: convert it to UTF-8$"):
        read_stdin()
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(ValueError, match="text is not UTF-8 text, it has the byte 0xe9"):
        read_text(tmp_path / "text")
    with pytest.raises(ValueError, match="--prompt is not UTF-8 text, it has the byte 0xe9"):
        check_text("--prompt", data.decode(errors="surrogateescape"))


@pytest.mark.parametrize("before", ["", "\n\n"])
def test_a_byte_order_mark_is_not_part_of_a_task(before: str, tmp_path: Path) -> None:
    (tmp_path / "tasks").write_text(before + json.dumps(TASK), encoding="utf-8-sig")
    assert [task.expect for task in read_tasks(tmp_path / "tasks")] == ["a bird"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps(TASK | {"messages": ["Hi"]}), "each with a role"),
        (json.dumps(TASK | {"messages": [{"content": "Hi"}]}), "each with a role"),
        (json.dumps(TASK | {"messages": [{"role": 7}]}), "each with a role"),
        (json.dumps(TASK | {"expect": "\ud800"}), "not UTF-8 text"),
        ("7", "a task must have messages and expect"),
    ],
)
def test_a_line_that_is_no_task_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tasks").write_text(f"{json.dumps(TASK)}\n{line}\n")
    with pytest.raises(ValueError, match=f"tasks, line 2: .*{words}"):
        read_tasks(tmp_path / "tasks")


@pytest.mark.parametrize("length", [0, 1, 400, 401, 100_000])
def test_a_long_message_is_cut_in_the_middle(length: int) -> None:
    text = "".join(str(number % 10) for number in range(length))
    shown = brief(ValueError(text))
    assert len(shown) <= 410
    assert shown == (text or "ValueError") or (shown.startswith(text[:300]) and shown.endswith(text[-100:]))
    assert brief(ValueError("a\n  b\tc")) == "a b c"


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "."])
def test_a_device_is_not_replaced_by_a_file(name: str) -> None:
    with pytest.raises(OSError, match="it is a folder or a device"), replacing(Path(name)):
        pytest.fail("it would be replaced")
