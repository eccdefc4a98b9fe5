"""The chat command as its users meet it: a pipe, a terminal, tools, Ctrl-C and mistakes."""

import io
import json
import os
import select
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

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from benchmarks.exact import load_resident
from demo import MODEL
from flashmoe_mlx import chat
from flashmoe_mlx.generation.conversation import Conversation
from flashmoe_mlx.generation.output_parser import Delta
from flashmoe_mlx.generation.python_tools import Toolbox
from tests.support.flags import STREAMING, flags
from tests.support.oracle import streamed

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
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, which comes to no end."""
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    config = qwen3_5_moe(layers=4, experts=16, top_k=4, hidden=128, intermediate=128, vocab=400)
    write_checkpoint(path, config, quantization={"group_size": 64, "bits": 4})
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


def test_pipe(pipe: Any) -> None:
    """Each line is a turn; answers are mlx-lm's own, and all else is on stderr."""
    questions = ["What is a heron?", "What is a crane?"]
    model, tokenizer = load_resident(str(MODEL)), load_tokenizer(MODEL)
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


def test_tools(pipe: Any, tools: Path) -> None:
    """Calls are shown, results and exceptions go back to the model, and what a tool prints is no answer."""
    out, err = pipe(f"{OSLO}\nWhat is the weather in Paris?\n", "--tools", str(tools), "--yes", "--ram-budget", "1GB")
    assert "7 degrees and rainy in Oslo" in out and "window" not in out
    lines = err.splitlines()
    shown = lines.index("get_weather(city='Oslo')")
    assert lines[shown + 1 : shown + 3] == ["looking out of the window", '{"temperature": 7, "sky": "rainy"}']
    assert lines[lines.index("get_weather(city='Paris')") + 1] == "error: LookupError: no such city"


@pytest.mark.parametrize("thinking", ["show", "hide"])
def test_thoughts(pipe: Any, talkative: Path, monkeypatch: pytest.MonkeyPatch, thinking: str) -> None:
    """They are no part of the answer, wherever the model sets its line breaks."""

    def answer(conversation: Conversation, *_: Any, **options: Any) -> Iterator[Delta]:
        yield Delta(reasoning="A bird, ")
        yield Delta(reasoning="I think.")
        yield Delta(content="\n\nA ")
        yield Delta(content="bird.")
        conversation.messages.append({"role": "assistant", "content": "A bird."})

    monkeypatch.setattr(Conversation, "answer", answer)
    out, err = pipe("What is a heron?", "--model", str(talkative), "--thinking", thinking)
    assert out == "A bird.\n"
    assert err == ("A bird, I think.\n" if thinking == "show" else "")


def test_a_long_answer_is_cut_off(pipe: Any, talkative: Path) -> None:
    _, err = pipe("What is a heron?", "--model", str(talkative), "--max-tokens", "3")
    assert "cut off after 3 tokens" in err


def test_only_new_tokens_are_read() -> None:
    """The second answer is that of a conversation read anew, and only what is new in it has been read."""
    model, tokenizer = streamed(MODEL), load_tokenizer(MODEL)
    conversation = Conversation(model, tokenizer)
    texts, lengths = [], []
    for question in ("What is a heron?", "What is a crane?"):
        conversation.messages.append({"role": "user", "content": question})
        lengths.append(len(tokenizer.apply_chat_template(conversation.messages, add_generation_prompt=True)))
        texts.append("".join(piece.content for piece in conversation.answer(8)))
        assert conversation.last
        read = conversation.last.prompt_tokens
    assert 0 < read < lengths[1] - lengths[0]
    # Something else was said: nothing of the state can be used.
    conversation.messages[:] = [{"role": "user", "content": "What is a crane?"}]
    assert list(conversation.answer(8)) and conversation.last
    assert conversation.last.prompt_tokens == len(
        tokenizer.apply_chat_template(conversation.messages[:1], add_generation_prompt=True)
    )


def test_an_argument_that_may_be_null_keeps_its_type() -> None:
    number = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    parameters = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    add = {"name": "add", "description": "Add two numbers.", "parameters": parameters}
    question = [{"role": "user", "content": "Add 7 and 81."}]
    conversation = Conversation(
        streamed(MODEL), load_tokenizer(MODEL), question, [{"type": "function", "function": add}]
    )
    list(conversation.answer(60))
    assert conversation.messages[-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 7, "b": 81}}


def test_thoughts_that_the_template_forgets() -> None:
    """What was thought is not in the next prompt: the conversation goes on from before the answer."""
    model, tokenizer = streamed(MODEL), load_tokenizer(MODEL)
    thought, kept = "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}", "'<|im_start|>assistant\\n' -}}"
    assert tokenizer.chat_template.count(thought) == 2
    tokenizer.chat_template = tokenizer.chat_template.replace(thought, kept, 1)
    conversation = Conversation(model, tokenizer, [{"role": "user", "content": "What is a heron?"}])
    list(conversation.answer(8))
    before = tokenizer.apply_chat_template(conversation.messages[:1], add_generation_prompt=False)
    conversation.messages.append({"role": "user", "content": "What is a crane?"})
    prompt = tokenizer.apply_chat_template(conversation.messages, add_generation_prompt=True)
    text = "".join(piece.content for piece in conversation.answer(8))
    assert conversation.last and conversation.last.prompt_tokens == len(prompt) - len(before)
    assert text == mlx_lm.generate(load_resident(str(MODEL)), tokenizer, prompt, max_tokens=8)


def test_stopped_answers() -> None:
    """What was said so far is kept; of what is left in another way, only that the prompt has been read."""
    model, tokenizer = streamed(MODEL), load_tokenizer(MODEL)
    conversation = Conversation(model, tokenizer, [{"role": "user", "content": "What is a heron?"}])
    for _ in conversation.answer(8):
        break
    assert len(conversation.messages) == 1
    spoken: list[str] = []
    for piece in conversation.answer(8, lambda: len(spoken) == 4):
        spoken.append(piece.content)
    assert len(spoken) == 5 and conversation.messages[1]["content"] == "".join(spoken)
    before, prompt = (
        tokenizer.apply_chat_template(conversation.messages[:1], add_generation_prompt=start) for start in (False, True)
    )
    assert conversation.last and conversation.last.prompt_tokens == len(prompt) - len(before)


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
        """What is shown from now on up to one of some texts."""
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
def test_ctrl_c(talkative: Path) -> None:
    """It stops the answer, and the program only where a line is asked for."""
    with terminal("--model", str(talkative), "--max-tokens", "100000") as run:
        run.until("> ")
        run.type("What is a heron?\n")
        run.until("What is a heron?\r\n")
        run.interrupt(0.5)
        assert "stopped" in run.until("\r\n> ")
        run.interrupt(0.3)
        run.until("interrupted")
        assert run.process.wait(timeout=20) == 130


@needs_terminal
def test_asks_before_it_runs_a_tool(tools: Path) -> None:
    """A no goes to the model, which may ask again; Ctrl-C there ends the turn."""
    with terminal("--tools", str(tools), "--ram-budget", "1GB", "--max-tokens", "40") as run:
        run.until("> ")
        run.type(f"{OSLO}\n")
        assert "get_weather(city='Oslo')" in run.until("[y/N] ")
        run.type("y\n")
        said = run.until("\r\n> ")
        assert "window" in said and "7 degrees and rainy in Oslo" in said
        assert "\x1b[2mPrompt: " in said  # dimmed
        run.type(f"{OSLO}\n")
        run.until("[y/N] ")
        run.type("n\n")
        said = run.until("[y/N] ", "\r\n> ")
        assert "the user did not allow" in said and "window" not in said
        if "[y/N] " in said:
            run.interrupt(0.3)
            assert "this turn is forgotten" in run.until("\r\n> ")
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
        (None, "no such file of tools"),
        ("x = 1", "defines no public function"),
        ("1 / 0", "does not run: ZeroDivisionError"),
        ("def f(:", "does not run: SyntaxError"),
        ("import sys; sys.exit(3)", "does not run: SystemExit"),
        ("def f(x: int): pass", "f cannot be a tool: "),
        ("def f(x):\n    '''What.\n\n    Args:\n        x: it\n    '''", "f cannot be a tool: "),
        ("def f(x: int):\n    '''What.'''", "no description for the argument 'x'"),
    ],
)
def test_tools_that_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str | None, words: str
) -> None:
    path = tmp_path / "my_tools.py"
    if source is not None:
        path.write_text(source)
    error = fail(capsys, "--tools", str(path), "--yes")
    assert words in error and str(path) in error


def test_mistakes(capsys: pytest.CaptureFixture[str], tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(OSLO))
    assert "pass --yes" in fail(capsys, "--tools", str(tools))
    assert "max_tokens is 0" in fail(capsys, "--max-tokens", "0")
    assert "leave it out" in fail(capsys, "--pipeline")


def test_toolbox() -> None:
    toolbox = Toolbox({})
    with pytest.raises(ValueError, match="no function 'rm'"):
        toolbox.refuse_call("rm", {})


def test_calls_that_fit_no_function(tools: Path) -> None:
    toolbox = Toolbox.load(str(tools))
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["get_weather"]
    for arguments in ({}, {"city": "Oslo", "planet": "Mars"}):
        with pytest.raises(ValueError, match="get_weather: "):
            toolbox.refuse_call("get_weather", arguments)


def test_every_flag_of_mlx_lm() -> None:
    stock, ours = flags(chat.mlx_chat.setup_arg_parser()), flags(chat.setup_arg_parser())
    assert stock <= ours
    assert ours - stock == STREAMING | {"--top-k", "--min-p", "--thinking", "--tools", "--yes"}


def test_nothing_commands_the_terminal() -> None:
    """Escape sequences that a model writes do not reach a terminal; a pipe gets what was said."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for file, written in ((Screen(), "a\ufffd[2Jb\tc\n"), (io.StringIO(), "a\x1b[2Jb\tc\n")):
        chat._write(file, "a\x1b[2Jb\tc\n")
        assert file.getvalue() == written
