"""A guess which experts the next layer will need, so that they are read while this one computes."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.ops.dispatch import few_tokens
from flashmoe_mlx.streaming.pool import Pool


class Lookahead:
    """The next layer's router, applied to this layer's input.

    Args:
        router (nn.Module): gives a logit for each expert, or expert numbers and their scores.
        top_k (int): experts a token uses.
        table (ExpertTable): the next layer's.
        pool (Pool): where its experts go.
    """

    def __init__(self, router: nn.Module, top_k: int, table: ExpertTable, pool: Pool):
        self._router = router
        self._top_k = top_k
        self._table = table
        self._pool = pool

    def guess(self, x: mx.array) -> mx.array | None:
        """Expert numbers ``[..., top_k]``, lazily; ``None`` for a prompt, which needs most experts anyway."""
        if not few_tokens(x):
            return None
        routed = self._router(x)
        if isinstance(routed, tuple):
            numbers: mx.array = routed[0]
            return numbers
        return mx.argpartition(-routed, kth=self._top_k - 1, axis=-1)[..., : self._top_k]

    def begin(self, experts: Sequence[int], pool: Pool, busy: int) -> None:
        """Start reading a guess, in the background.

        Args:
            experts (Sequence[int]): the guess.
            pool (Pool): of the layer that is being computed.
            busy (int): how many of its experts an unfinished graph may read.
        """
        known = [expert for expert in experts if expert < self._table.experts]  # LongCat's router knows empty ones too
        self._pool.prefetch(self._table, known, busy if pool is self._pool else 0)
