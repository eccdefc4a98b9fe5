"""The host sync of a MoE layer: it waits for the router's choice, and keeps slots that are being read from changing."""

import time
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from flashmoe_mlx.layers.readback import Readback
from flashmoe_mlx.streaming.counters import Counters


class RouterSync:
    """Brings router indices to the host, and knows which outputs may still read slots. One for all layers of a model.

    A slot may be overwritten once every graph that reads it has run. Each call of a layer waits for the expert outputs
    of the call before, whichever layer's it was, so no others are ever pending. While decoding this costs nothing: they
    are ancestors of the router's choice, which the host waits for anyway.

    Args:
        counters (Counters): Adds up the time waited.
        readback (Readback, optional): Returns indices with less latency than MLX. Default: ``None``.
    """

    def __init__(self, counters: Counters, readback: Readback | None = None) -> None:
        self._counters = counters
        self._readback = readback
        self._written: mx.array | None = None
        self._pending: list[mx.array] = []

    def launch(self, indices: mx.array, guess: mx.array | None = None) -> None:
        """Start computing what :meth:`wait` will be asked for."""
        writes = None if self._readback is None else self._readback.write(indices)
        self._written = None if writes is None else indices
        mx.async_eval([each for each in (indices, writes, guess) if each is not None])  # type: ignore[no-untyped-call]

    def wait(self, indices: mx.array, guess: mx.array | None = None) -> list[int]:
        """Return ``indices`` as a flat list, and evaluate ``guess`` and everything pending.

        From then on no graph reads a slot except those launched for this call, which read experts that the call needs.
        """
        begin = time.perf_counter()
        numbers = self._readback.poll() if self._readback is not None and self._written is indices else None
        arrays = [each for each in (guess, indices if numbers is None else None) if each is not None]
        self.drain(*arrays)
        if numbers is None:
            numbers = np.asarray(indices).ravel().tolist()
        self._counters.sync_seconds += time.perf_counter() - begin
        return numbers

    def hold(self, outputs: Iterable[mx.array]) -> None:
        """Note that ``outputs`` read slots and may not have run."""
        self._pending.extend(outputs)

    def drain(self, *arrays: mx.array) -> None:
        """Evaluate ``arrays`` and everything pending."""
        pending, self._pending = self._pending, []
        mx.eval(*arrays, *pending)
