"""Compares experts with a manifest when they are read for the first time."""

from collections.abc import Iterable, Sequence
from threading import Lock

import xxhash

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.manifest import Manifest, join_digests
from flashmoe_mlx.streaming.read import OnFilled


class ManifestCheck:
    """Compares each expert with its digest when it is read for the first time.

    Args:
        manifest (Manifest): The digests.
        tables (Iterable[ExpertTable]): The streamed layers.
    """

    def __init__(self, manifest: Manifest, tables: Iterable[ExpertTable]):
        self._manifest = manifest
        self._tables = {table.layer: table for table in tables}
        self._checked: set[tuple[str, int]] = set()

    def on_filled(self, layer: str, experts: Sequence[int], buffers: Sequence[Sequence[memoryview]]) -> OnFilled | None:
        """Return a callback that compares each expert once all of its parts have been read.

        Args:
            layer (str): Path of the layer.
            experts (Sequence[int]): The experts that are being read.
            buffers (Sequence[Sequence[memoryview]]): The buffers of the parts of each expert.

        Returns:
            OnFilled, optional: Any thread may call it with buffers that have been filled. It raises OSError if an
            expert differs from the manifest. ``None`` if all have been compared before.
        """
        new = [pair for pair in zip(experts, buffers, strict=True) if (layer, pair[0]) not in self._checked]
        if not new:
            return None
        part_of = {id(buffer): (i, part) for i, (_, parts) in enumerate(new) for part, buffer in enumerate(parts)}
        digests: list[dict[int, bytes]] = [{} for _ in new]
        # Two threads may fill the last parts of an expert at once, and exactly one must find it complete.
        lock = Lock()

        def check(filled: Sequence[memoryview]) -> None:
            for buffer in filled:
                if id(buffer) not in part_of:
                    continue
                number, part = part_of[id(buffer)]
                # Outside the lock, because hashing runs in parallel.
                digest = xxhash.xxh3_64_digest(buffer)
                expert, parts = new[number]
                with lock:
                    digests[number][part] = digest
                    complete = len(digests[number]) == len(parts)
                if complete:
                    table = self._tables[layer]
                    in_order = [digests[number][each] for each in range(len(parts))]
                    self._manifest.refuse_damaged(table, expert, join_digests(table, in_order))
                    self._checked.add((layer, expert))

        return check
