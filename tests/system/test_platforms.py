"""Nothing needs what only Linux has."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Those that need no matplotlib, which is only installed to draw.
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "def main() -> None:" in (text := path.read_text()) and "matplotlib" not in text
)
# Another interpreter runs it.
BENCHMARKS.remove("gguf_model")

HELP = f"""
import runpy, sys
import tests.support.fake_mac
for name in {BENCHMARKS}:
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module(f"benchmarks.{{name}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, name
"""


def test_every_benchmark_starts_on_a_mac() -> None:
    ended = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage:") == len(BENCHMARKS)


@pytest.mark.parametrize("folder", ["flashmoe_mlx", "benchmarks", "demo", "tests"])
def test_no_process_forks(folder: str) -> None:
    """A forked child cannot use Metal."""
    this = Path(__file__)
    found = [path for path in (ROOT / folder).rglob("*.py") if "os.fork(" in path.read_text() and path != this]
    assert found == []
