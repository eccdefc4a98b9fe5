"""The drop-ins for mlx-lm's switch layers: same call, same numbers, experts from disk or all in memory."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.layers.expert_mlp import ExpertFunction, Experts
from flashmoe_mlx.layers.fence import Fence
from flashmoe_mlx.layers.lookahead import Lookahead
from flashmoe_mlx.ops.dispatch import few_tokens
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.system.memory import return_freed_memory


class ResidentSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` with all experts in memory: no host sync, nothing to read.

    Args:
        switch (nn.Module): the layer to replace.
    """

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.switch = switch
        self._experts = Experts(switch)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the routed experts, lazily; see :meth:`StreamedSwitchGLU.__call__`."""
        return self._experts.function(x, indices)(x, indices)


class StreamedSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` on the slots of a pool.

    The arithmetic is the switch layer's own: its parameters become the pool's slabs, and it is called with slot
    numbers where it had expert numbers.

    Args:
        switch (nn.Module): the layer to replace; it is taken over and must not be used elsewhere.
        table (ExpertTable): where its experts lie.
        pool (Pool): where they go.
        fence (Fence): the model's.

    Attributes:
        hidden (int): width of the experts' input. A block may project its own to it.
        start_early (Callable, optional): gives what needs ``x`` and no experts, to be launched before experts are read.
        lookahead (Lookahead, optional): guesses what the next layer will need.
        slots_now (Callable, optional): tells how many slots the pool should have, if that may change. Only for a pool
            that no other layer uses.
    """

    def __init__(self, switch: nn.Module, table: ExpertTable, pool: Pool, fence: Fence):
        super().__init__()
        self.hidden: int = (switch.down_proj if isinstance(switch, SwitchGLU) else switch.fc2).output_dims
        self.start_early: Callable[[mx.array], mx.array | None] | None = None
        self.lookahead: Lookahead | None = None
        self.slots_now: Callable[[Pool], int] | None = None
        # Not the switch itself: as a module it would make the slabs parameters of the model.
        self._experts_on = partial(_experts_on, switch)
        self._table = table
        self._pool = pool
        self._fence = fence
        self._bind()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the routed experts.

        Args:
            x (mx.array): ``[..., hidden]``.
            indices (mx.array): expert numbers ``[..., experts_per_token]``, any integer dtype.

        Returns:
            mx.array: ``[..., experts_per_token, hidden]``, computed in the background.

        Raises:
            ReadError: an expert could not be read; the next call works.
        """
        if indices.size == 0:
            return mx.zeros((*indices.shape, self.hidden), x.dtype)
        guess = [] if self.lookahead is None or (guessed := self.lookahead.guess(x)) is None else [guessed]
        ahead = None
        if few_tokens(x):
            self._fence.launch(indices, guess)  # first: what is launched together ends together
            early = self.start_early(x) if self.start_early else None
            if not guess and (places := self._pool.slot_indices(self._table)) is not None:
                ahead = self._experts.ahead(x, indices, places)
            mx.async_eval([y for y in (early, ahead) if y is not None])  # type: ignore[no-untyped-call]
        pairs = self._fence.read(indices, guess)  # [tokens * top_k]: pair p is an expert of token p // top_k
        if ahead is not None:
            self._fence.hold([ahead])
        needed = sorted(set(pairs))
        self._fit(needed)
        if ahead is not None and self._pool.touch(self._table, needed):
            return ahead
        experts = self._experts.function(x, indices)
        hits, waves = self._pool.waves(self._table, needed, together=not self._experts.splits(experts))
        y = self._compute(experts, x, indices.shape, pairs, hits, waves, ahead if hits else None)
        if self.lookahead and guess and len(needed) <= self._pool.slots:
            self.lookahead.begin(sorted(set(np.asarray(guess[0]).ravel().tolist())), self._pool, busy=len(needed))
        return y

    def _fit(self, needed: list[int]) -> None:
        """Follow the machine's memory."""
        if self.slots_now is not None and (slots := self.slots_now(self._pool)) != self._pool.slots:
            self._fence.wait()  # for what was launched for this call
            self._pool.resize(slots, self._table, needed)
        if self._moves != self._pool.moves:  # not only after what was just done: that may have been interrupted
            self._bind()
            return_freed_memory()

    def _bind(self) -> None:
        """Compute with the pool's slabs."""
        self._experts = self._experts_on(self._pool.slabs)
        self._moves = self._pool.moves

    def _compute(
        self,
        experts: ExpertFunction,
        x: mx.array,
        shape: tuple[int, ...],
        pairs: list[int],
        hits: list[int],
        waves: list[list[int]],
        ahead: mx.array | None,
    ) -> mx.array:
        """Fetch wave after wave and launch its share of the call."""
        if hits and ahead is None:
            waves = [hits, *waves]
        if len(waves) == 1 and ahead is None:  # the call that mlx-lm would make: a GPU may round others differently
            slot_of = self._pool.fetch(self._table, waves[0])
            y = _launch(experts, x, [slot_of[expert] for expert in pairs], shape)
            self._fence.hold([y])
            return y

        top_k = shape[-1]
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        wave_of = {expert: number for number, wave in enumerate(waves) for expert in wave}
        parts: list[list[int]] = [[] for _ in waves]  # the pairs of each wave
        for pair, expert in enumerate(pairs):
            if expert in wave_of:
                parts[wave_of[expert]].append(pair)

        computed: list[tuple[mx.array, Sequence[int]]] = []  # outputs [some pairs, 1, hidden], and of which pairs
        running: deque[tuple[mx.array, int]] = deque()  # the latest of them, and how many slots each reads
        if ahead is not None:
            self._pool.fetch(self._table, hits)
            computed.append((ahead.reshape(len(pairs), 1, -1), range(len(pairs))))
            running.append((ahead, len(hits)))
        for wave, part in zip(waves, parts, strict=True):
            while sum(count for _, count in running) + len(wave) > self._pool.slots:
                mx.eval(running.popleft()[0])
            slot_of = self._pool.fetch(self._table, wave)  # while the wave before is computed
            rows = mx.array([pair // top_k for pair in part])
            output = _launch(experts, tokens[rows], [slot_of[pairs[pair]] for pair in part], (len(part), 1))
            computed.append((output, part))
            running.append((output, len(wave)))
        self._fence.hold(output for output, _ in running)
        place_of = {pair: place for place, pair in enumerate(pair for _, part in computed for pair in part)}  # the last
        places = mx.array([place_of[pair] for pair in range(len(pairs))])
        return mx.concatenate([output for output, _ in computed])[places].reshape(*shape, -1)


def _experts_on(switch: nn.Module, slabs: Mapping[str, Slab]) -> Experts:
    switch.update(tree_unflatten([(name, slab.array) for name, slab in slabs.items()]))
    return Experts(switch)


def _launch(experts: ExpertFunction, x: mx.array, slots: list[int], shape: tuple[int, ...]) -> mx.array:
    """Start computing experts that are in slots, so that it goes on while the host does."""
    y = experts(x, mx.array(slots, mx.uint32).reshape(shape))
    mx.async_eval(y)  # type: ignore[no-untyped-call]
    return y
