"""Keeps the set of resident experts in a file from one run to the next."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.system.atomic_write import replacing


def save_residents(path: str | Path, pools: Iterable[Pool]) -> None:
    """Write the numbers of the resident experts of each layer, the least recently used first.

    Raises:
        OSError: The file cannot be written. An older file stays as it was.
    """
    experts: dict[str, list[int]] = defaultdict(list)
    for pool in pools:
        for layer, expert in pool.residents:
            experts[layer].append(expert)
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(json.dumps({"experts": experts}))


def load_residents(path: str | Path, tables: Mapping[str, tuple[ExpertTable, Pool]]) -> None:
    """Read the experts in a file into slots: of each layer the most recently used ones that fit.

    Args:
        path (str or Path): A file of :func:`save_residents`. If there is none, nothing happens.
        tables (Mapping): The table and the pool of each streamed layer.

    Raises:
        FileNotFoundError: The folder of the file does not exist.
        ValueError: The file is damaged, or of another model.
        OSError: An expert could not be read.
    """
    try:
        content = json.loads(Path(path).read_text())["experts"]
        experts = {layer: list(dict.fromkeys(map(index, numbers))) for layer, numbers in content.items()}
    except FileNotFoundError as error:
        folder = Path(path).absolute().parent
        if folder.is_dir():
            return
        raise FileNotFoundError(
            f"no folder {folder} for the warm-start file: create it, or it cannot be written at the end"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid warm-start file: delete it, and it will be recreated") from error
    known = {layer: numbers for layer, numbers in experts.items() if layer in tables}
    for layer, numbers in known.items():
        count = tables[layer][0].experts
        if unknown := [number for number in numbers if not 0 <= number < count]:
            raise ValueError(
                f"{path} is of another model: it has expert {unknown[0]} of {layer}, which has {count}. "
                "Delete it, or give another --warm-start"
            )
    for layer, numbers in known.items():
        table, pool = tables[layer]
        pool.load(table, numbers[-pool.slots :])
