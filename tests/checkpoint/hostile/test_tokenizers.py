"""A tokenizer loads, or one line names the file, for any content of its files."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.model.tokenizer import load_tokenizer
from tests.conftest import WriteFamily

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
ODD = (None, [], {}, 7, -1, "x", 1e300, True, [1], {"a": 1}, 2**70)
# Too large to visit, and a setting that makes the tokenizers library abort the process: no Python code can catch that.
SKIPPED = {"vocab", "merges", "continuing_subword_prefix"}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value, and of the first three items of a list."""
    if path:
        yield path
    keys = (
        value.keys() - SKIPPED if isinstance(value, dict) else range(min(3, len(value)) if type(value) is list else 0)
    )
    for key in sorted(keys):
        yield from paths(value[key], (*path, key))


@pytest.mark.parametrize("seed", range(8))
def test_a_changed_entry_is_accepted_or_one_line(seed: int, checkpoint: WriteFamily, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    choose = random.Random(seed)
    refused = 0
    for _ in range(25):
        file = folder / choose.choice(FILES)
        before = file.read_text()
        changed = json.loads(before)
        *parents, last = choose.choice(list(paths(changed)))
        place = changed
        for key in parents:
            place = place[key]
        if choose.random() < 0.2:
            del place[last]
        else:
            place[last] = choose.choice(ODD)
        file.write_text(json.dumps(changed))
        try:
            load_tokenizer(folder)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(folder) in str(error)
            assert "\n" not in str(error)
        file.write_text(before)
    # Neither everything nor nothing matters.
    assert 0 < refused < 25
