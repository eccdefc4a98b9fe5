"""Compare experts with a manifest when they are read for the first time."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import xxhash

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.manifest import Manifest, _joined


class ManifestCheck:
    """Compares each expert with its digest when it is read for the first time.

    Args:
        manifest (Manifest): has the digests.
        tables (Iterable[ExpertTable]): of the layers.
    """

    def __init__(self, manifest: Manifest, tables: Iterable[ExpertTable]):
        self._manifest = manifest
        self._tables = {table.layer: table for table in tables}
        self._checked: set[tuple[str, int]] = set()

    def on_filled(
        self, layer: str, experts: Sequence[int], buffers: Sequence[Sequence[memoryview]]
    ) -> Callable[[Sequence[memoryview]], None] | None:
        """What compares each of a layer's experts when the last of its parts has landed, if any is new.

        Args:
            layer (str): the layer's name.
            experts (Sequence[int]): those that are being read.
            buffers (Sequence): where the parts of each go.

        Returns:
            Callable: to be called, by any thread, with buffers that have been filled. It raises OSError if an expert is
            not what the manifest has.
        """
        new = [pair for pair in zip(experts, buffers, strict=True) if (layer, pair[0]) not in self._checked]
        if not new:
            return None
        place_of = {id(buffer): (i, part) for i, (_, parts) in enumerate(new) for part, buffer in enumerate(parts)}
        digests = [[b""] * len(parts) for _, parts in new]
        others = [deque(parts[1:]) for _, parts in new]  # as many as must have landed before the last

        def landed(filled: Sequence[memoryview]) -> None:
            for buffer in filled:
                if id(buffer) not in place_of:
                    continue
                number, part = place_of[id(buffer)]
                digests[number][part] = xxhash.xxh3_64_digest(buffer)
                try:
                    others[number].pop()
                except IndexError:  # this was the last
                    expert, table = new[number][0], self._tables[layer]
                    self._manifest.refuse_damaged(table, expert, _joined(table, digests[number]))
                    self._checked.add((layer, expert))

        return landed
