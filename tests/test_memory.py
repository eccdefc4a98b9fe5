"""Loading reads the trunk and nothing else, and memory stays within trunk, slots and a little."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from tests.conftest import WriteFamily

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PYTHON_OBJECTS = 8_000_000  # bytes for spans, headers, the tokenizer and a few tokens' activations


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 500 MB, nearly all of it experts; not quantised, because that would take most of the time."""
    folder = tmp_path_factory.mktemp("large")
    write_checkpoint(folder, qwen3_5_moe(layers=4, experts=160, top_k=8, hidden=256, intermediate=256, vocab=512))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_usage(fraction: float, large: Path, checkpoint: WriteFamily) -> None:
    total = 4 * 160 * 3 * 256 * 256 * 4
    command = [sys.executable, "-m", "tests.usage", checkpoint("qwen3_5_moe"), large, str(int(fraction * total))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert usage["experts"] == total > 500e6
    assert usage["slots"] == (fraction * total or 32 * total // (4 * 160))
    other_files = sum(file.stat().st_size for file in large.iterdir() if file.suffix != ".safetensors")
    assert usage["read"] < 1.05 * (usage["trunk"] + other_files)
    assert usage["peak"] < 1.15 * (usage["trunk"] + usage["slots"]) + PYTHON_OBJECTS
