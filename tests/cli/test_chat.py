"""The chat command as its users meet it: on a pipe, on a terminal, with tools, Ctrl-C and mistakes."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from flashmoe_mlx import chat
from flashmoe_mlx.cli.terminal import write
from flashmoe_mlx.generation import generator, kv_cache
from flashmoe_mlx.generation.conversation import Conversation
from flashmoe_mlx.generation.output_parser import Delta
from tests.conftest import WriteFamily
from tests.support.flags import STREAMING, flags
from tests.support.oracle import resident

TOOLS = '''
from typing import Literal

def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict:
    """The weather in a city.

    Args:
        city: Name of the city
        unit: Unit of the temperature
    """
    if city == "Paris":
        raise LookupError("no such\\ncity")
    print("looking out of the window")
    return {"temperature": 7, "sky": "rainy"}

def _helper():
    pass
'''
OSLO = "What is the weather in Oslo?"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "my_tools.py"
    path.write_text(TOOLS)
    return path


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, checkpoint: WriteFamily) -> Path:
    """A model of random weights, which never ends an answer."""
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    shutil.copytree(checkpoint("qwen3_5_moe"), path)
    for name, key, value in (("config.json", "eos_token_id", 10**6), ("tokenizer_config.json", "eos_token", "<never>")):
        written = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(written | {key: value}))
    return path


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with lines on stdin; returns what it wrote."""

    def run(lines: str, *argv: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        chat.main(argv)
        return tuple(capsys.readouterr())

    return run


def test_each_line_of_a_pipe_is_a_turn_with_mlx_lms_own_answer(pipe: Any) -> None:
    """Answers are on stdout, everything else is on stderr."""
    questions = ["What is a heron?", "What is a crane?"]
    model, tokenizer = resident(MODEL), load_tokenizer(MODEL)
    messages: list[dict[str, Any]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": mlx_lm.generate(model, tokenizer, prompt)})
    out, err = pipe(f"{questions[0]}\n\n{questions[1]}", "--ram-budget", "1GB")
    assert out == "".join(f"{message['content']}\n" for message in messages[1::2])
    assert "wading bird" in out
    assert (err.count("\nPrompt: "), err.count("\nExperts: ")) == (2, 2)
    assert "\x1b" not in err and ">" not in err


def test_results_and_exceptions_of_tools_go_back_to_the_model(pipe: Any, tools: Path) -> None:
    """Calls are shown, and what a tool prints is not part of the answer."""
    out, err = pipe(f"{OSLO}\nWhat is the weather in Paris?\n", "--tools", str(tools), "--yes", "--ram-budget", "1GB")
    assert "7 degrees and rainy in Oslo" in out and "window" not in out
    lines = err.splitlines()
    shown = lines.index("get_weather(city='Oslo')")
    assert lines[shown + 1 : shown + 3] == ["looking out of the window", '{"temperature": 7, "sky": "rainy"}']
    assert lines[lines.index("get_weather(city='Paris')") + 1] == "error: LookupError: no such city"


@pytest.mark.parametrize("thinking", ["show", "hide"])
def test_thoughts_are_shown_or_hidden_and_never_on_stdout(
    pipe: Any, endless: Path, monkeypatch: pytest.MonkeyPatch, thinking: str
) -> None:
    """The line feeds between a thought and the answer are in neither."""

    def answer(conversation: Conversation, *_: Any, **options: Any) -> Iterator[Delta]:
        yield Delta(reasoning="A bird, ")
        yield Delta(reasoning="I think.")
        yield Delta(content="\n\nA ")
        yield Delta(content="bird.")
        conversation.messages.append({"role": "assistant", "content": "A bird."})

    monkeypatch.setattr(Conversation, "answer", answer)
    out, err = pipe("What is a heron?", "--model", str(endless), "--thinking", thinking)
    assert out == "A bird.\n"
    assert err == ("A bird, I think.\n" if thinking == "show" else "")


def test_a_long_answer_is_cut_off(pipe: Any, endless: Path) -> None:
    _, err = pipe("What is a heron?", "--model", str(endless), "--max-tokens", "3")
    assert "cut off after 3 tokens" in err


def test_a_limited_kv_cache_is_one_also_in_a_hybrid_model(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Any]] = []
    monkeypatch.setattr(
        generator, "make_kv_cache", lambda *args: made.append(kv_cache.make_kv_cache(*args)) or made[-1]
    )
    question = "What is a heron?"
    whole, _ = pipe(question, "--ram-budget", "1GB")
    assert pipe(question, "--ram-budget", "1GB", "--max-kv-size", "256")[0] == whole
    assert pipe(question, "--ram-budget", "1GB", "--max-kv-size", "8", "--max-tokens", "12")[0]
    limited = [layer for layer in made[-1] if isinstance(layer, kv_cache.RotatingKVCache)]
    assert limited and len(limited) < len(made[-1])
    assert [layer.keys.shape[2] for layer in limited] == [8] * len(limited)


class Terminal:
    """The command on a terminal."""

    def __init__(self, *argv: str):
        self._screen, keyboard = os.openpty()
        command = [sys.executable, "-m", "flashmoe_mlx.chat", *argv]
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=keyboard, stdout=keyboard, stderr=keyboard, env=environment, start_new_session=True
        )
        os.close(keyboard)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self, pause: float) -> None:
        """Ctrl-C after some seconds; readline shows its question a moment before it hears."""
        time.sleep(pause)
        self.process.send_signal(signal.SIGINT)

    def until(self, *texts: str) -> str:
        """Return the output from now on up to one of some texts."""
        begin, deadline = len(self.shown), time.monotonic() + 60
        while not any(text in self.shown[begin:] for text in texts):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._screen], [], [], 1)[0]:
                self.shown += os.read(self._screen, 65536).decode(errors="replace")
        return self.shown[begin:]


@contextmanager
def terminal(*argv: str) -> Iterator[Terminal]:
    run = Terminal(*argv)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
        os.close(run._screen)


needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")


@needs_terminal
def test_ctrl_c_stops_an_answer_and_at_a_prompt_the_program(endless: Path) -> None:
    with terminal("--model", str(endless), "--max-tokens", "100000") as run:
        run.until("> ")
        run.type("What is a heron?\n")
        run.until("What is a heron?\r\n")
        run.interrupt(0.5)
        assert "stopped" in run.until("\r\n> ")
        run.interrupt(0.3)
        run.until("interrupted")
        assert run.process.wait(timeout=20) == 130


@needs_terminal
def test_a_tool_runs_only_after_a_yes(tools: Path) -> None:
    """A no is reported to the model, which may ask again; Ctrl-C there discards the turn."""
    with terminal("--tools", str(tools), "--ram-budget", "1GB", "--max-tokens", "40") as run:
        run.until("> ")
        run.type(f"{OSLO}\n")
        assert "get_weather(city='Oslo')" in run.until("[y/N] ")
        run.type("y\n")
        said = run.until("\r\n> ")
        assert "window" in said and "7 degrees and rainy in Oslo" in said
        dimmed = "\x1b[2m"
        assert f"{dimmed}Prompt: " in said
        run.type(f"{OSLO}\n")
        run.until("[y/N] ")
        run.type("n\n")
        said = run.until("[y/N] ", "\r\n> ")
        assert "the user did not allow" in said and "window" not in said
        if "[y/N] " in said:
            run.interrupt(0.3)
            assert "this turn was discarded" in run.until("\r\n> ")
        run.type("q\n")
        assert run.process.wait(timeout=20) == 0


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as stop:
        chat.main(["--model", str(MODEL), *argv])
    assert stop.value.code == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "no such file"),
        ("x = 1", "has no public functions"),
        ("1 / 0", "does not run: ZeroDivisionError"),
        ("def f(:", "does not run: SyntaxError"),
        ("import sys; sys.exit(3)", "does not run: SystemExit"),
        ("def f(x: int): pass", "f cannot be a tool: "),
        ("def f(x):\n    '''What.\n\n    Args:\n        x: it\n    '''", "f cannot be a tool: "),
        ("def f(x: int):\n    '''What.'''", "no description for the argument 'x'"),
    ],
)
def test_a_file_without_usable_tools_is_refused_with_its_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str | None, words: str
) -> None:
    path = tmp_path / "my_tools.py"
    if source is not None:
        path.write_text(source)
    error = fail(capsys, "--tools", str(path), "--yes")
    assert words in error and str(path) in error


def test_impossible_flags_are_refused(
    capsys: pytest.CaptureFixture[str], tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(OSLO))
    assert "pass --yes" in fail(capsys, "--tools", str(tools))
    assert "max_tokens is 0" in fail(capsys, "--max-tokens", "0")
    assert "leave it out" in fail(capsys, "--pipeline")
    assert "max_kv_size is 4: it must be at least 5" in fail(capsys, "--max-kv-size", "4")


def test_every_flag_of_mlx_lm_is_accepted() -> None:
    stock, ours = flags(chat.mlx_chat.setup_arg_parser()), flags(chat.setup_arg_parser())
    assert stock <= ours
    assert ours - stock == STREAMING | {"--top-k", "--min-p", "--thinking", "--tools", "--yes"}


def test_control_characters_reach_a_pipe_but_not_a_terminal() -> None:

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for file, written in ((Screen(), "a\ufffd[2Jb\tc\n"), (io.StringIO(), "a\x1b[2Jb\tc\n")):
        write(file, "a\x1b[2Jb\tc\n")
        assert file.getvalue() == written
