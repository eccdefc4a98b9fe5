"""Drop-ins for mlx-lm's switch layers: same call, same numbers, experts streamed or all in memory."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.layers.decode_step import is_decode_step
from flashmoe_mlx.layers.expert_mlp import ExpertFunction, ExpertMLP
from flashmoe_mlx.layers.lookahead import Lookahead
from flashmoe_mlx.layers.router_sync import RouterSync
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.system.memory import return_freed_memory


class ResidentSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` with all experts in memory: no host sync, nothing to read.

    Args:
        switch (nn.Module): The layer to replace.
        backend (Backend): The model's.

    Attributes:
        experts (ExpertMLP): Computes them.
    """

    def __init__(self, switch: nn.Module, backend: Backend):
        super().__init__()
        self.switch = switch
        self.experts = ExpertMLP(switch, backend)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the routed experts, lazily; see :meth:`StreamedSwitchGLU.__call__`."""
        return self.experts.implementation(x, indices)(x, indices)


class StreamedSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` on the slots of a pool.

    Args:
        switch (nn.Module): The layer to replace; it is taken over and must not be used elsewhere. Its parameters become
            the pool's slabs, and it is called with slot numbers instead of expert numbers.
        table (ExpertTable): Where its experts lie in the checkpoint.
        pool (Pool): Holds them.
        sync (RouterSync): The model's.
        backend (Backend): The model's.
        start_shared (Callable, optional): Returns what else of the block needs ``x`` alone, such as its shared
            expert's output, to be launched before experts are read. Default: ``None``.
        lookahead (Lookahead, optional): Prefetches the next layer's experts. Default: ``None``.
        target_slots (Callable, optional): Returns how many slots the pool should have now. Only for a pool that no
            other layer uses. Default: ``None``, their number stays.

    Attributes:
        experts (ExpertMLP): Computes experts in slots. Another one after the pool was resized.
        hidden (int): Width of the experts' input and output. A block may project its own to it.
    """

    def __init__(
        self,
        switch: nn.Module,
        table: ExpertTable,
        pool: Pool,
        sync: RouterSync,
        backend: Backend,
        *,
        start_shared: Callable[[mx.array], mx.array | None] | None = None,
        lookahead: Lookahead | None = None,
        target_slots: Callable[[Pool], int] | None = None,
    ):
        super().__init__()
        self.hidden: int = output_width(switch)
        # Not the switch itself: as a child module it would make the slabs parameters of the model.
        self._compute_on = partial(_compute_on, switch, backend)
        self._table = table
        self._pool = pool
        self._sync = sync
        self._start_shared = start_shared
        self._lookahead = lookahead
        self._target_slots = target_slots
        # On a CPU, reads and products share the cores: computing resident experts while others are read gains nothing
        # and costs a second launch. Resident experts are launched early only if the call before had no misses.
        self._shares_cores = mx.default_device().type == mx.cpu
        self._missed = False
        self._bind()

    def __call__(self, x: mx.array, indices: mx.array, overlap: mx.array | None = None) -> mx.array:
        """Apply the routed experts.

        Args:
            x (mx.array): ``[..., hidden]``.
            indices (mx.array): Expert numbers ``[..., top_k]``, any integer dtype.
            overlap (mx.array, optional): Launched together with the experts, while missing ones are read.

        Returns:
            mx.array: ``[..., top_k, hidden]``, computed in the background.

        Raises:
            ReadError: An expert could not be read; the next call works.
        """
        if indices.size == 0:
            return mx.zeros((*indices.shape, self.hidden), x.dtype)
        guess = None if self._lookahead is None else self._lookahead.guess(x)
        resident = None
        if is_decode_step(x):
            # Start the router's read-back first: what is launched together completes together.
            self._sync.launch(indices, guess)
            resident = self._launch_resident(x, indices, overlap, guess)
        # The only host sync of the layer.
        expert_ids = self._sync.wait(indices, guess)  # [tokens * top_k]
        if resident is not None:
            self._sync.hold([resident])
        needed = sorted(set(expert_ids))
        self._follow_memory(needed)
        if resident is not None and self._pool.touch(self._table, needed):
            return resident
        y = self._fetch_and_compute(x, indices, expert_ids, needed, resident)
        if self._lookahead is not None and guess is not None and len(needed) <= self._pool.slots:
            self._lookahead.prefetch(guess, self._pool, busy=len(needed))
        return y

    def _launch_resident(
        self, x: mx.array, indices: mx.array, overlap: mx.array | None, guess: mx.array | None
    ) -> mx.array | None:
        """Launch what needs no read: the shared expert, and the experts in slots. Return the latter's output."""
        if overlap is None and self._start_shared is not None:
            overlap = self._start_shared(x)
        launches = guess is None and not (self._shares_cores and self._missed)
        slots = self._pool.slot_indices(self._table) if launches else None
        resident = None if slots is None else self.experts.resident(x, indices, slots)
        mx.async_eval([y for y in (overlap, resident) if y is not None])  # type: ignore[no-untyped-call]
        return resident

    def _follow_memory(self, needed: list[int]) -> None:
        """Resize the pool as the machine's free memory allows."""
        if self._target_slots is not None and (slots := self._target_slots(self._pool)) != self._pool.slots:
            self._sync.drain()
            self._pool.resize(slots, self._table, needed)
        # Compared every time, because a resize may have been interrupted before this layer took the new slabs.
        if self._moves != self._pool.moves:
            self._bind()
            return_freed_memory()

    def _bind(self) -> None:
        """Compute with the pool's slabs."""
        self.experts = self._compute_on(self._pool.slabs)
        self._moves = self._pool.moves

    def _fetch_and_compute(
        self, x: mx.array, indices: mx.array, expert_ids: list[int], needed: list[int], resident: mx.array | None
    ) -> mx.array:
        """Read missing experts wave after wave, and launch each wave's share of the call."""
        compute = self.experts.implementation(x, indices)
        whole = self._shares_cores and is_decode_step(x)
        hits, waves = self._pool.waves(self._table, needed, together=whole or not self.experts.splits(compute))
        self._missed = bool(waves)
        if not hits:
            resident = None
        elif resident is None:
            waves = [hits, *waves]
        if len(waves) == 1 and resident is None:
            # The call that mlx-lm would make: on a GPU, calls of other shapes may round differently.
            slot_of = self._pool.fetch(self._table, waves[0])
            y = _launch(compute, x, [slot_of[expert] for expert in expert_ids], indices.shape)
            self._sync.hold([y])
            return y

        top_k = indices.shape[-1]
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        # Pair p is expert expert_ids[p] of token p // top_k.
        pairs = _pairs_of_waves(expert_ids, waves)
        outputs: list[mx.array] = []  # each [pairs, 1, hidden]
        order: list[int] = []
        # Outputs that may not have run, and how many slots each reads.
        running: deque[tuple[mx.array, int]] = deque()
        if resident is not None:
            self._pool.fetch(self._table, hits)
            outputs.append(resident.reshape(len(expert_ids), 1, -1))
            order.extend(range(len(expert_ids)))
            running.append((resident, len(hits)))
        for wave, part in zip(waves, pairs, strict=True):
            while sum(slots for _, slots in running) + len(wave) > self._pool.slots:
                mx.eval(running.popleft()[0])
            # Reads while the wave before computes.
            slot_of = self._pool.fetch(self._table, wave)
            rows = mx.array([pair // top_k for pair in part])
            output = _launch(compute, tokens[rows], [slot_of[expert_ids[pair]] for pair in part], (len(part), 1))
            outputs.append(output)
            order.extend(part)
            running.append((output, len(wave)))
        self._sync.hold(output for output, _ in running)
        # The last row of a pair is the right one: resident rows of missing experts are zero, and their wave follows.
        row_of = {pair: row for row, pair in enumerate(order)}
        rows = mx.array([row_of[pair] for pair in range(len(expert_ids))])
        return mx.concatenate(outputs)[rows].reshape(*indices.shape, -1)


def output_width(switch: nn.Module) -> int:
    """Return the width of a switch layer's output."""
    width: int = (switch.down_proj if isinstance(switch, SwitchGLU) else switch.fc2).output_dims
    return width


def _compute_on(switch: nn.Module, backend: Backend, slabs: Mapping[str, Slab]) -> ExpertMLP:
    switch.update(tree_unflatten([(name, slab.array) for name, slab in slabs.items()]))
    return ExpertMLP(switch, backend)


def _pairs_of_waves(expert_ids: Sequence[int], waves: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the pairs of token and expert that each wave computes."""
    wave_of = {expert: number for number, wave in enumerate(waves) for expert in wave}
    pairs: list[list[int]] = [[] for _ in waves]
    for pair, expert in enumerate(expert_ids):
        if expert in wave_of:
            pairs[wave_of[expert]].append(pair)
    return pairs


def _launch(compute: ExpertFunction, x: mx.array, slots: list[int], shape: tuple[int, ...]) -> mx.array:
    """Start computing experts that are in slots; the device continues while the host does."""
    y = compute(x, mx.array(slots, mx.uint32).reshape(shape))
    mx.async_eval(y)  # type: ignore[no-untyped-call]
    return y
