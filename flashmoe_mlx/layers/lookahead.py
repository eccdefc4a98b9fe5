"""Prediction of the next layer's experts, so that they are read while this layer computes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.layers.decode_step import is_decode_step
from flashmoe_mlx.streaming.pool import Pool


class Lookahead:
    """Applies the next layer's router to this layer's input, and prefetches the experts it chooses.

    Args:
        router (nn.Module): The next layer's. Returns a logit per expert, or expert numbers and their scores.
        top_k (int): Experts per token.
        table (ExpertTable): The next layer's.
        pool (Pool): The next layer's.
    """

    def __init__(self, router: nn.Module, top_k: int, table: ExpertTable, pool: Pool):
        self._router = router
        self._top_k = top_k
        self._table = table
        self._pool = pool

    def guess(self, x: mx.array) -> mx.array | None:
        """Return expert numbers ``[..., top_k]``, lazily; ``None`` for a prompt, which needs most experts anyway."""
        if not is_decode_step(x):
            return None
        routed = self._router(x)
        if isinstance(routed, tuple):
            numbers: mx.array = routed[0]
            return numbers
        return mx.argpartition(-routed, kth=self._top_k - 1, axis=-1)[..., : self._top_k]

    def prefetch(self, guess: mx.array, pool: Pool, busy: int) -> None:
        """Start to read the experts of a guess in the background.

        Args:
            guess (mx.array): From :meth:`guess`, evaluated.
            pool (Pool): The pool of the layer that is computing.
            busy (int): How many of its experts an unfinished graph may read.
        """
        experts = sorted(set(np.asarray(guess).ravel().tolist()))
        # LongCat's router also chooses zero-computation experts, whose numbers follow the others.
        known = [expert for expert in experts if expert < self._table.experts]
        self._pool.prefetch(self._table, known, busy if pool is self._pool else 0)
