"""``make`` finds a Python that is new enough, or says what to install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("make", "sh", "uname", "awk", "touch")

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make")

# Xcode's: the first program of the Makefile prints the version, the second tells whether it is new enough.
OLD = """#!/bin/sh
case "$2" in
  *print*) echo "3.9 at /usr/bin/python3" ;;
  *) exit 1 ;;
esac
"""
RECENT = "#!/bin/sh\nexit 0\n"


def make(folder: Path, pythons: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in a copy of the project that was not installed, with no Python but these in the path."""
    for name in ("Makefile", "pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, folder)
    programs = folder / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    for name, text in pythons.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # Make tells a make below it what it was asked for.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(
        [programs / "make", *arguments], cwd=folder, env=kept | {"PATH": str(programs)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("target", ["demo", "test", "mac"])
def test_an_old_python_is_refused_in_one_line(target: str, tmp_path: Path) -> None:
    ended = make(tmp_path, {"python3": OLD}, target)
    assert ended.returncode == 2
    # After make's own "Makefile:60: ***".
    (line,) = ended.stderr.splitlines()
    assert "Python 3.11 or newer is needed; found 3.9 at /usr/bin/python3; install it" in line
    assert f"make PYTHON=python3.13 {target}" in line
    assert not (tmp_path / ".venv").exists()


def test_a_recent_python_is_found_behind_an_old_one(tmp_path: Path) -> None:
    ended = make(tmp_path, {"python3": OLD, "python3.12": RECENT}, "-n", "demo")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[0] == "python3.12 -m venv .venv"


def test_help_lists_every_target(tmp_path: Path) -> None:
    targets = [line.split()[1] for line in make(tmp_path, {}, "help").stdout.splitlines()]
    assert {"demo", "test", "test-mac", "mac", "check"} <= set(targets)
