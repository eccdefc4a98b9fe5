"""Loading reads the trunk only, and memory holds the trunk and the slots only: measured by the kernel, from outside."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

PROGRAM = """
import json, sys
from pathlib import Path
import mlx_lm.generate
from flashmoe_mlx.model.load import load

def status(key, file):
    return next(int(line.split()[1]) for line in Path(f"/proc/self/{file}").read_text().splitlines() if key in line)

folder, budget = sys.argv[1], int(sys.argv[2])
mlx_lm.utils.load_tokenizer(folder)  # imports what a tokenizer needs, which is not the model's
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
resident, read = 1024 * status("VmRSS", "status"), status("rchar", "io")
model, tokenizer = load(folder, ram_budget=budget)
read = status("rchar", "io") - read
for _ in mlx_lm.stream_generate(model, tokenizer, "What is a heron?", max_tokens=20):
    pass
peak = 1024 * status("VmHWM", "status") - resident
streaming = model.streaming
print(json.dumps([read, peak, streaming.trunk_nbytes, streaming.slots_nbytes, streaming.experts_nbytes]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """More than 500 MB of experts; not quantised, because that would take longer to write."""
    path = tmp_path_factory.mktemp("large")
    config = qwen3_5_moe(layers=4, experts=64, top_k=8, hidden=512, intermediate=320, vocab=16000)
    write_checkpoint(path, config)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("share", [0, 0.25])
def test_trunk_and_slots_only(folder: Path, share: float) -> None:
    budget = int(share * 503_316_480)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(budget)]
    read, peak, trunk, slots, experts = json.loads(subprocess.check_output(command))
    assert experts == 503_316_480
    assert slots == (budget or 32 * 3 * 4 * 512 * 320)
    tokenizer = sum(file.stat().st_size for file in folder.glob("*") if file.suffix != ".safetensors")
    assert trunk < read < 1.05 * (trunk + tokenizer)
    assert peak < 1.15 * (trunk + slots)


SHRINKING = """
import json, sys
import mlx_lm.generate
import psutil
from functools import partial
from flashmoe_mlx.model import swap
from flashmoe_mlx.model.load import load
from flashmoe_mlx.streaming.memory_pressure import MemoryPressure

free = [10**12]
swap.MemoryPressure = partial(MemoryPressure, available=lambda: free[0], reserve=10**9, seconds=0)
model, tokenizer = load(sys.argv[1], ram_budget=400_000_000)

def held(available):
    free[0] = available
    text = mlx_lm.generate(model, tokenizer, "What is a heron?", max_tokens=20)
    return psutil.Process().memory_info().rss, text

print(json.dumps([held(10**12), held(0), held(10**12)]))
"""


def test_shrunk_pools_give_their_pages_back(folder: Path) -> None:
    (before, text), (less, same), (after, again) = json.loads(
        subprocess.check_output([sys.executable, "-c", SHRINKING, str(folder)])
    )
    assert text == same == again
    # Of 400 MB, one token's experts stay.
    assert before - less > 250e6
    assert after - less > 250e6
