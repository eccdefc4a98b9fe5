"""The command: wrong arguments, and signals."""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from flashmoe_mlx import server
from tests.support.serving import HERON, Running


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_cancels_the_answer_and_exits(
    busy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client whose answer takes too long gets the reason, and main() returns."""
    monkeypatch.setattr(server, "_SHUTDOWN_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    errors: list[str] = []

    def use() -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=50)
        try:
            client.models.list()
            if busy:
                options: Any = {"logit_bias": {"6135": -100, "6137": -100}, "max_tokens": 8000}
                stream = client.chat.completions.create(model="any", messages=HERON, stream=True, **options)
                next(iter(stream))
            os.kill(os.getpid(), signal.SIGTERM)
            if busy:
                list(stream)
        except openai.APIError as error:
            errors.append(str(error))

    user = threading.Thread(target=use)
    user.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        server.main(["--port", str(port)])
    finally:
        signal.signal(signal.SIGTERM, before)
    user.join()
    assert errors == (["The server is shutting down."] if busy else [])
    assert capsys.readouterr().out.startswith("Experts: ")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host", "0.0.0.0"], "set --api-key-file"),
        (["--host", "0.0.0.0", "--api-key-file", "SHORT"], "16 ASCII characters"),
        (["--api-key-file", "nowhere"], "No such file"),
        (["--port", "70000"], "--port is 70000"),
        (["--temp", "-1"], "--temp is -1"),
        (["--max-tokens", "0"], "--max-tokens is 0: it must be a positive integer"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens is 0: it must be a positive integer"),
        (["--max-completion-tokens", "0"], "--max-completion-tokens is 0: it must be a positive integer"),
        (["--max-queue", "-1"], "--max-queue is -1: it must not be negative"),
        (["--model", "./nowhere"], "no such folder"),
        (["--chat-template-args", "[]"], "must be a JSON object"),
        (
            ["--port", "TAKEN"],
            "cannot listen on port TAKEN of 127.0.0.1: Address already in use; choose another --port",
        ),
        (["--host", "localhost", "--port", "TAKEN"], "port TAKEN of localhost"),
    ],
)
def test_a_wrong_argument_gives_one_line_of_error(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, running: Running
) -> None:
    (tmp_path / "key").write_text("short")
    known = {"SHORT": str(tmp_path / "key"), "TAKEN": str(running.server.server_port)}
    with pytest.raises(SystemExit) as stop:
        server.main([known.get(arg, arg) for arg in argv])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("error: ")
    assert words.replace("TAKEN", known["TAKEN"]) in error


def test_a_request_without_max_tokens_is_not_limited_by_default() -> None:
    args = server.setup_arg_parser().parse_args([])
    assert args.max_tokens is None and server._defaults(args)["max_tokens"] is None
