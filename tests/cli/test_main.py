"""The command ``flashmoe``: its table of commands, help, versions and tab completion."""

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

import flashmoe_mlx
from flashmoe_mlx import __main__
from flashmoe_mlx.cli import version as version_module
from flashmoe_mlx.cli.commands import COMMANDS
from flashmoe_mlx.cli.completion import command_parsers, completion
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.ops.native import Kernels
from tests.support.flags import flags

PACKAGE = Path(flashmoe_mlx.__file__).parent


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flashmoe_mlx", *argv], capture_output=True, text=True, timeout=60)


def test_every_module_that_can_be_run_is_a_command() -> None:
    modules = {file.stem for file in PACKAGE.glob("*.py") if "run_module(__file__)" in file.read_text()}
    assert modules == {command.module for command in COMMANDS}


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_the_commands(argv: list[str]) -> None:
    ended = run(*argv)
    assert (ended.returncode, ended.stderr) == (0, "")
    for command in COMMANDS:
        # Name and summary fit on one line.
        assert f"    {command.name:<20}{command.summary}\n" in ended.stdout
    assert all(len(line) <= 80 for line in ended.stdout.splitlines())


def test_help_imports_neither_mlx_nor_mlx_lm() -> None:
    program = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("flashmoe_mlx", run_name="__main__")
finally:
    print(sorted({"mlx", "mlx_lm", "numpy", "shtab"} & set(sys.modules)))
"""
    begin = time.monotonic()
    out = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)
    assert out.splitlines()[-1] == "[]"
    # It takes 0.1 seconds on an idle machine.
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("name", ["generate", "verify"])
def test_a_command_names_itself_as_it_was_started(name: str) -> None:
    assert run(name, "--help").stdout.startswith(f"usage: python -m flashmoe_mlx {name} ")
    started = [sys.executable, "-m", f"flashmoe_mlx.{name}", "--help"]
    assert subprocess.check_output(started, text=True).startswith(f"usage: python -m flashmoe_mlx.{name} ")
    installed = f"""
import sys
from flashmoe_mlx.__main__ import main
sys.argv = ["/usr/bin/flashmoe", "{name}", "--help"]
main()
"""
    started = [sys.executable, "-c", installed]
    assert subprocess.check_output(started, text=True).startswith(f"usage: flashmoe {name} ")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("genrate", "did you mean generate?"),
        ("server", "did you mean serve?"),
        ("cache_prompt", "did you mean cache-prompt?"),
        ("xyz", "python -m flashmoe_mlx --help lists them"),
    ],
)
def test_an_unknown_command_is_one_line_and_exit_code_2(name: str, advice: str) -> None:
    ended = run(name, "--model", "x")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"python -m flashmoe_mlx: error: unknown command '{name}': {advice}\n"


def test_a_command_gets_its_arguments_and_its_exit_code_is_passed_on() -> None:
    ended = run("verify", "./nowhere")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "error: no such folder: nowhere\n")
    assert run("verify", "--nonsense").returncode == 2


def test_version_names_packages_and_backend() -> None:
    package, mlx, mlx_lm, _, last = run("--version").stdout.splitlines()
    assert package == f"flashmoe_mlx {flashmoe_mlx.__version__}"
    assert (mlx, mlx_lm) == (f"MLX {version('mlx')}", f"mlx-lm {version('mlx-lm')}")
    assert last.startswith("backend: ")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Backend.METAL, "Metal kernels on Fast One"),
        (Backend.CUDA, "CUDA kernels on Fast One"),
        (Backend.REFERENCE, "MLX operations on Fast One, without native kernels"),
    ],
)
def test_the_backend_is_the_kernels_and_the_device(
    chosen: Backend, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_module, "choose_backend", lambda: chosen)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Fast One"})
    assert version_module.describe_backend() == words


def test_native_kernels_are_shown_with_their_instruction_set(native: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_module, "choose_backend", lambda: Backend.NATIVE)
    assert version_module.describe_backend().endswith(f" ({native.instruction_set()}, {native.threads()} threads)")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag(shell: str) -> None:
    parsers = command_parsers()
    script = completion(__main__.setup_arg_parser(parsers), shell)
    for name, parser in parsers.items():
        assert name in script
        for flag in flags(parser):
            assert flag.lstrip("-") in script


def test_completion_works_in_bash(tmp_path: Path) -> None:
    (tmp_path / "completion").write_text(run("--print-completion", "bash").stdout)
    (tmp_path / "model.manifest").touch()
    program = """
source completion
complete_line() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_flashmoe
    echo "${COMPREPLY[@]}"
}
complete_line flashmoe cache
complete_line flashmoe chat --ram
complete_line flashmoe serve --manifest mod
"""
    out = subprocess.check_output(["bash", "-c", program], text=True, cwd=tmp_path)
    assert out.splitlines() == ["cache-prompt", "--ram-budget", "model.manifest"]


def test_the_package_exports_are_lazy() -> None:
    program = """
import sys, flashmoe_mlx
assert not {"mlx", "mlx_lm"} & set(sys.modules)
from flashmoe_mlx import Config, ReadError
assert Config(read_threads=2).read_threads == 2 and issubclass(ReadError, OSError)
assert not {"mlx", "mlx_lm"} & set(sys.modules)
from flashmoe_mlx import load
assert callable(load) and "mlx_lm" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError, match="has no attribute 'unload'"):
        flashmoe_mlx.unload  # noqa: B018 - the access is the test
