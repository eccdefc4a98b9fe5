"""The prefix cache: states of the model after earlier prompts, in memory and optionally on disk."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal

from mlx_lm.models.cache import LRUPromptCache

from flashmoe_mlx.generation.kv_cache import can_roll_back
from flashmoe_mlx.generation.prefix_store import PrefixStore

Kind = Literal["system", "user", "assistant"]


class PrefixCache:
    """Keeps states of the model, to continue from the longest one that a prompt begins with.

    A state is the model's cache, one item per layer. Linear-attention state cannot be rolled back, so states are also
    kept where later prompts may diverge. The least recently kept ones are evicted, those of answers (``"assistant"``)
    before those of questions (``"user"``), and those of preambles (``"system"``) last.

    Args:
        max_entries (int): How many states are kept in memory. Default: ``1024``.
        max_bytes (int, optional): Memory for them. Default: no limit.
        store (PrefixStore, optional): Where preambles are kept on disk. Default: nowhere.
    """

    def __init__(self, max_entries: int = 1024, max_bytes: int | None = None, store: PrefixStore | None = None):
        self._memory = LRUPromptCache(max_entries, 1 << 63 if max_bytes is None else max_bytes)
        self._store = store

    @property
    def nbytes(self) -> int:
        """Memory that the states take."""
        return int(self._memory.nbytes)

    def nearest(self, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """Return a copy of the state from which the fewest tokens are left to prefill.

        Args:
            tokens (Sequence[int]): The prompt, without its last token if that is computed anyway.

        Returns:
            tuple: (state, how many of the tokens it has seen); ``(None, 0)`` if no state fits.
        """
        cache, rest = self._memory.fetch_nearest_cache(None, list(tokens))
        seen = len(tokens) - len(rest)
        try:
            found = self._store and self._store.longest(tokens, beyond=seen)
        except OSError as error:
            logging.warning("cannot read the prefix cache on disk: %s", error)
            found = None
        if found:
            cache, seen = found
            self._memory.insert_cache(None, list(tokens[:seen]), copy.deepcopy(cache), cache_type="system")
        return cache, seen

    def needs_prefix(self, cache: list[Any], kind: Kind) -> bool:
        """Say whether the state after a prefix must be kept by itself.

        A state that can be trimmed also serves every prefix of its tokens, but only in memory.
        """
        return not can_roll_back(cache) or (kind == "system" and self._store is not None)

    def keep_prefix(self, tokens: Sequence[int], cache: list[Any], kind: Kind) -> None:
        """Keep a copy of the state after a prefix of a prompt; that of a preamble on disk, too.

        Args:
            tokens (Sequence[int]): All tokens that the state has seen.
            cache (list): The state.
            kind (str): ``"system"`` for a preamble, ``"user"`` for a prompt up to the start of its answer.
        """
        self._memory.insert_cache(None, list(tokens), copy.deepcopy(cache), cache_type=kind)
        if kind == "system" and self._store is not None:
            # The answer does not depend on it.
            try:
                self._store.store(tokens, cache)
            except OSError as error:
                logging.warning("cannot write the prefix cache on disk: %s", error)

    def keep(self, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep the state after an answer. The caller must not use it any more.

        Args:
            tokens (Sequence[int]): All tokens that the state has seen.
            cache (list): The state.
        """
        self._memory.insert_cache(None, list(tokens), cache)
