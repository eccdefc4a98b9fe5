"""Synchronization between the router's choice, the slots and the host."""

import time
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from flashmoe_mlx.layers.readback import Mailbox
from flashmoe_mlx.streaming.counters import Counters


class Fence:
    """Tells what the router chose, and when slots are idle. One for all layers of a model.

    A slot may be overwritten once every graph that reads it has run. Each call of a layer waits for the expert
    outputs of the call before, whichever layer's it was, so no others are ever pending. While decoding this costs
    nothing: they are ancestors of the router's choice, which has to be waited for anyway.

    Args:
        counters (Counters): where the time is added up.
        mailbox (Mailbox, optional): tells the choice sooner than MLX. Default: ``None``.
    """

    def __init__(self, counters: Counters, mailbox: Mailbox | None = None) -> None:
        self._counters = counters
        self._mailbox = mailbox
        self._posted: mx.array | None = None
        self._pending: list[mx.array] = []

    def launch(self, indices: mx.array, others: list[mx.array]) -> None:
        """Start computing what :meth:`read` will be asked for, and ``others``."""
        letter = self._mailbox.post(indices) if self._mailbox else None
        self._posted = None if letter is None else indices
        mx.async_eval([indices, *others] if letter is None else [indices, letter, *others])  # type: ignore[no-untyped-call]

    def read(self, indices: mx.array, others: list[mx.array]) -> list[int]:
        """The numbers of ``indices``, flat; ``others`` and what is pending are evaluated, too.

        Then no graph reads a slot, but what was launched for this call: it reads experts that the call needs.
        """
        begin = time.perf_counter()
        numbers = self._mailbox.take() if self._mailbox and self._posted is indices else None
        self.wait(*others, *([] if numbers is not None else [indices]))
        if numbers is None:
            numbers = np.asarray(indices).ravel().tolist()
        self._counters.sync_seconds += time.perf_counter() - begin
        return numbers

    def hold(self, outputs: Iterable[mx.array]) -> None:
        """Note that ``outputs`` read slots and may not have run."""
        self._pending.extend(outputs)

    def wait(self, *arrays: mx.array) -> None:
        """Evaluate ``arrays`` and what is pending."""
        pending, self._pending = self._pending, []
        mx.eval(*arrays, *pending)
