"""Ctrl-C, kills, full disks and parallel processes: files stay whole, and nobody sees a traceback."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.cli.commands import COMMANDS
from tests.conftest import WriteFamily
from tests.support import children

STARTS = [
    *((f"flashmoe_mlx.{command.module}",) for command in COMMANDS),
    *(("flashmoe_mlx", command.name) for command in COMMANDS),
]
"""Each way to start a command, as a module and its arguments."""


@pytest.fixture(scope="module")
def folder(checkpoint: WriteFamily) -> Path:
    return checkpoint("qwen3_5_moe")


@pytest.mark.parametrize("count", [3, pytest.param(300, marks=pytest.mark.soak)])
def test_ctrl_c_at_any_moment_ends_a_command_within_a_second(count: int, folder: Path, tmp_path: Path) -> None:
    """The text so far is printed, and a file is the old one or the new one."""
    runs = children.interrupt(tmp_path, str(folder), count)
    complete = {run["case"]: run["out"] for run in runs[:3]}
    seconds = [run["seconds"] for run in runs[3:] if run["err"]] or [0]
    # A machine with twice the load takes twice as long.
    allowed = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    print(f"{Counter(run['code'] for run in runs[3:])}, of {allowed:.1f} seconds allowed after Ctrl-C:")
    print(*(f"{share}% took {np.percentile(seconds, share):.2f} at most" for share in (50, 90, 99, 100)), sep="\n")
    assert all(run["code"] == 0 for run in runs[:3])
    assert max(seconds) < allowed
    for run in runs[3:]:
        assert run["manual"] != "mix"
        assert not run["left"]
        # The command had ended, and Python was shutting down.
        if run["code"] in (0, -signal.SIGINT) and not run["err"]:
            assert len(run["out"]) > 0.8 * len(complete[run["case"]]), run
        else:
            assert (run["code"], run["err"]) == (130, "\ninterrupted\n"), run
            if run["case"] != "cache_prompt":
                assert complete[run["case"]].startswith(run["out"].rstrip("\n\ufffd").split("Prompt:")[0])


DURING_IMPORTS = """
class Finder:
    def find_spec(name, *_):
        if name == "mlx_lm":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""
AT_EXIT = """
atexit.register(os.kill, os.getpid(), signal.SIGINT)
"""


def interrupted(start: tuple[str, ...], moment: str) -> subprocess.CompletedProcess[str]:
    """Start a command with --help, and send it Ctrl-C at a moment."""
    module, *argv = start
    program = f"""
import atexit, os, runpy, signal, sys
{moment}
sys.argv[1:] = {[*argv, "--help"]}
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_ctrl_c_during_imports_ends_a_command(start: tuple[str, ...]) -> None:
    ended = interrupted(start, DURING_IMPORTS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize("start", [("flashmoe_mlx.verify",), ("flashmoe_mlx", "verify")], ids=" ".join)
def test_ctrl_c_at_exit_ends_a_command(start: tuple[str, ...]) -> None:
    ended = interrupted(start, AT_EXIT)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")
    assert ended.stdout.startswith("usage")


@pytest.mark.parametrize("start", [("flashmoe_mlx.verify",), ("flashmoe_mlx", "verify")], ids=" ".join)
def test_ctrl_c_stays_ignored_where_it_was(start: tuple[str, ...]) -> None:
    """A script's background commands ignore it."""
    ended = interrupted(start, f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{DURING_IMPORTS}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage")


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_a_killed_writer_leaves_the_old_or_the_new_file(count: int, folder: Path, tmp_path: Path) -> None:
    """The next writer removes what is left over."""
    runs = children.kill(tmp_path, str(folder), count)
    assert len(runs) == count + 1
    assert all(run["code"] == -9 and run["whole"] for run in runs)
    assert runs[-1]["left"] == []
    print(f"{count} kills, {sum(bool(run['left']) for run in runs)} of them in the middle of a file")


def test_a_full_disk_leaves_the_old_file_alone(folder: Path, tmp_path: Path) -> None:
    """Nothing else is left, and the message names the file."""
    *runs, command = children.disk_full(tmp_path, str(folder))
    for run in runs:
        assert (run["code"], run["err"]) == (0, "")
        assert run["error"].startswith(f"cannot write {tmp_path}")
        assert run["same"] and run["changed"] and run["left"] == []
    assert (command["code"], command["left"]) == (1, [])
    assert command["err"].startswith("error: cannot write") and command["err"].count("\n") == 1


@pytest.mark.parametrize("count", [2])
def test_processes_share_one_folder(count: int, folder: Path, tmp_path: Path) -> None:
    runs = children.together(tmp_path, str(folder), count)
    assert all((run["code"], run["err"]) == (0, "") for run in runs)
    assert len({run["out"] for run in runs[::2]}) == 1
    assert all(run["manual"] > 0 and run["residents"] == ["experts"] for run in runs)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="counts what is open")
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.soak)])
def test_loads_leak_no_files_and_no_threads(count: int, folder: Path) -> None:
    """Not even loads that fail."""

    def held() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/dev/fd").iterdir())), threading.active_count()

    def load() -> None:
        model, _ = flashmoe_mlx.load(str(folder), ram_budget="1MB")
        # Starts threads.
        model.streaming.pools[0].load(model.layers[0].mlp.switch_mlp._table, [0, 1])

    load()
    before = held()
    for _ in range(count):
        load()
        with pytest.raises(ValueError, match="experts_per_token"):
            flashmoe_mlx.load(str(folder), experts_per_token=99)
    assert held() == before


@pytest.mark.parametrize(
    "busy",
    [
        # In C, for minutes.
        "print('text', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
        # In a finalizer, where Python drops exceptions.
        "weakref.finalize(Thing(), finalizer); time.sleep(60)",
    ],
)
def test_ctrl_c_ends_a_main_thread_that_cannot_react(busy: str) -> None:
    program = f"""
import hashlib, time, weakref
from flashmoe_mlx.cli.errors import one_line_errors

class Thing:
    pass

def finalizer():
    print("text", flush=True)
    time.sleep(60)

with one_line_errors():
    {busy}
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "text\n"
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "\ninterrupted\n")
    assert time.monotonic() - begin < 3
