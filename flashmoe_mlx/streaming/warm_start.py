"""The set of experts in memory, kept in a file from one run to the next."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.system.atomic_write import replacing


def save_residents(path: str | Path, pools: Iterable[Pool]) -> None:
    """Write which experts are in slots, of each layer the least recently used first.

    The file changes as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    experts: dict[str, list[int]] = defaultdict(list)
    for pool in pools:
        for layer, expert in pool.residents:
            experts[layer].append(expert)
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(json.dumps({"experts": experts}))


def load_residents(path: str | Path, tables: Mapping[str, tuple[ExpertTable, Pool]]) -> None:
    """Read the experts that a file names into slots, of each layer the most recently used that fit.

    Args:
        path (str or Path): what :func:`save_residents` wrote. If there is none yet, nothing happens.
        tables (Mapping): each streamed layer's table and pool.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: the file is damaged or another model's.
        OSError: an expert could not be read.
    """
    try:
        content = json.loads(Path(path).read_text())["experts"]
        experts = {layer: list(dict.fromkeys(map(index, numbers))) for layer, numbers in content.items()}
    except FileNotFoundError as error:
        if Path(path).absolute().parent.is_dir():
            return
        raise FileNotFoundError(f"no folder for {path}: make it, or the run's end cannot write there") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no list of experts in memory: remove it, and it is written anew") from error
    known = {layer: numbers for layer, numbers in experts.items() if layer in tables}
    for layer, numbers in known.items():
        count = tables[layer][0].experts
        if unknown := [number for number in numbers if not 0 <= number < count]:
            raise ValueError(
                f"{path} names expert {unknown[0]} of {layer}, which has {count}: it is another model's. "
                "Remove it or give another --warm-start"
            )
    for layer, numbers in known.items():
        table, pool = tables[layer]
        pool.load(table, numbers[-pool.slots :])
