"""The drop-in for mlx-lm's switch layers: same call, same numbers, experts from disk."""

from collections import deque
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from flashmoe_mlx.expert_table import ExpertTable
from flashmoe_mlx.pool import Pool


class Fence:
    """Tells when slots are idle. One for all layers of a model.

    A slot may be overwritten once every graph that reads it has run. Each call of a layer waits for the expert
    outputs of the call before, whichever layer's it was, so no others are ever pending. While decoding this costs
    nothing: they are ancestors of the router's choice, which has to be waited for anyway.
    """

    def __init__(self) -> None:
        self._pending: list[mx.array] = []

    def wait(self, indices: mx.array) -> None:
        """Evaluate ``indices`` and what is pending. Then every slot is idle."""
        pending, self._pending = self._pending, []
        mx.eval(indices, *pending)

    def hold(self, outputs: Iterable[mx.array]) -> None:
        """Note that ``outputs`` read slots and may not have run."""
        self._pending.extend(outputs)


class StreamedSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` on the slots of a pool.

    The arithmetic is the switch layer's own: its parameters become the pool's slabs, and it is called with slot
    numbers where it had expert numbers.

    Args:
        switch (nn.Module): the layer to replace; it is taken over and must not be used elsewhere.
        table (ExpertTable): where its experts lie.
        pool (Pool): where they go.
        fence (Fence): the model's.
    """

    def __init__(self, switch: nn.Module, table: ExpertTable, pool: Pool, fence: Fence):
        super().__init__()
        switch.update(tree_unflatten([(name, slab.array) for name, slab in pool.slabs.items()]))
        # A bound method, because a module here would make the slabs parameters of the model.
        self._switch = switch.__call__
        self._table = table
        self._pool = pool
        self._fence = fence

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the routed experts.

        Args:
            x (mx.array): ``[..., hidden]``.
            indices (mx.array): expert numbers ``[..., experts_per_token]``, any integer dtype.

        Returns:
            mx.array: ``[..., experts_per_token, hidden]``, computed in the background.

        Raises:
            OSError: an expert could not be read.
        """
        self._fence.wait(indices)  # the only host sync of the layer
        routed = np.asarray(indices)
        experts = sorted(set(routed.ravel().tolist()))
        hits = self._pool.find(self._table, experts)
        misses = [expert for expert in experts if expert not in hits]
        if len(experts) > self._pool.slots:
            return self._in_waves(x, routed, hits, misses)
        slot_of = hits | self._pool.fill(self._table, misses)
        y = self._launch(x, routed, slot_of)
        self._fence.hold([y])
        return y

    def _in_waves(self, x: mx.array, routed: np.ndarray, hits: dict[int, int], misses: list[int]) -> mx.array:
        """Compute more experts than there are slots: each once, hits first, one wave while the next one is read."""
        slots = self._pool.slots
        size = max(1, slots // 2)
        waves: list[list[int]] = [list(hits)] if hits else []
        waves += [misses[first : first + size] for first in range(0, len(misses), size)]
        wave_of = np.empty(self._table.experts, np.int64)
        for number, wave in enumerate(waves):
            wave_of[wave] = number

        top_k = routed.shape[-1]
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        pairs = routed.ravel()  # [tokens * top_k], pair p is token p // top_k
        order = np.lexsort((pairs, wave_of[pairs]))
        ends = np.cumsum(np.bincount(wave_of[pairs]))

        outputs: list[mx.array] = []  # [pairs of the wave, 1, hidden]
        running: deque[tuple[mx.array, int]] = deque()  # the latest of them, and how many slots each reads
        for wave, part in zip(waves, np.split(order, ends[:-1]), strict=True):
            while sum(count for _, count in running) + len(wave) > slots:
                mx.eval(running.popleft()[0])
            slot_of = hits if wave[0] in hits else self._pool.fill(self._table, wave)
            outputs.append(self._launch(tokens[mx.array(part // top_k)], pairs[part, None], slot_of))
            running.append((outputs[-1], len(wave)))
        self._fence.hold(output for output, _ in running)
        return mx.concatenate(outputs)[mx.array(np.argsort(order))].reshape(*routed.shape, -1)

    def _launch(self, x: mx.array, routed: np.ndarray, slot_of: dict[int, int]) -> mx.array:
        """Start computing experts that are in slots, so that they run while the host goes on."""
        # For a token's few experts a list is five times faster than NumPy's indexing.
        slots = mx.array([slot_of[expert] for expert in routed.ravel().tolist()], mx.uint32)
        y: mx.array = self._switch(x, slots.reshape(routed.shape))
        mx.async_eval(y)  # type: ignore[no-untyped-call]
        return y
