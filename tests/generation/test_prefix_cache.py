"""States of earlier prompts: which are found, which are evicted, and which go to disk."""

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.generation.prefix_store import PrefixStore

TOKENS = list(range(5, 45))


def attention(tokens: int) -> list[Any]:
    """A state that can be rolled back."""
    cache = KVCache()
    values = mx.arange(tokens, dtype=mx.float32).reshape(1, 1, tokens, 1) * mx.ones(64)
    cache.update_and_fetch(values, values)
    return [cache]


def linear(value: float) -> list[Any]:
    """A state that cannot be rolled back."""
    cache = ArraysCache(1)
    cache[0] = mx.full((1, 64), value)
    return [cache]


def test_the_longest_prefix_is_found_as_a_copy() -> None:
    cache = PrefixCache()
    for length in (3, 9, 20):
        cache.keep_prefix(TOKENS[:length], linear(length), "user")
    found, seen = cache.nearest(TOKENS[:12])
    assert found and seen == 9 and found[0][0][0, 0] == 9
    found[0][0] = mx.zeros((1, 64))
    again, _ = cache.nearest(TOKENS[:12])
    assert again and again[0][0][0, 0] == 9
    assert cache.nearest([7, *TOKENS]) == (None, 0)


def test_a_longer_state_is_rolled_back_where_it_can_be() -> None:
    cache = PrefixCache()
    cache.keep(TOKENS, attention(len(TOKENS)))
    found, seen = cache.nearest([*TOKENS[:30], 7, 7])
    assert found and seen == found[0].offset == 30
    cache = PrefixCache()
    cache.keep(TOKENS, linear(1))
    assert cache.nearest([*TOKENS[:30], 7, 7]) == (None, 0)


@pytest.mark.parametrize(
    ("state", "needed"),
    [
        (attention(3), False),
        (linear(1), True),
        ([*attention(3), *linear(1)], True),
        ([RotatingKVCache(max_size=8)], True),
        ([CacheList(KVCache(), RotatingKVCache(max_size=8))], True),
        ([CacheList(KVCache(), KVCache())], False),
    ],
)
def test_a_prefix_needs_its_own_state_where_a_longer_one_cannot_be_rolled_back(
    state: list[Any], needed: bool, tmp_path: Path
) -> None:
    """A sliding window can, but only until it is full."""
    assert PrefixCache().needs_prefix(state, "user") == needed
    assert PrefixCache().needs_prefix(state, "system") == needed
    stored = PrefixCache(store=PrefixStore(tmp_path / "store", 1 << 30, "a" * 32))
    assert stored.needs_prefix(state, "user") == needed
    assert stored.needs_prefix(state, "system")


def test_two_entries_are_the_last_question_and_the_last_answer() -> None:
    cache = PrefixCache(max_entries=2)
    for turn in range(4):
        question, answer = TOKENS[: 4 * turn + 2], TOKENS[: 4 * turn + 4]
        cache.keep_prefix(question, linear(len(question)), "user")
        cache.keep(answer, linear(len(answer)))
        assert [cache.nearest(TOKENS[:length])[1] for length in (len(question), len(answer))] == [
            len(question),
            len(answer),
        ]
    assert cache.nearest(TOKENS[:12])[1] == 0


def test_preambles_are_evicted_last() -> None:
    nbytes = linear(0)[0].nbytes
    cache = PrefixCache(max_bytes=3 * nbytes)
    cache.keep_prefix(TOKENS[:5], linear(5), "system")
    for first in range(10):
        cache.keep([first], linear(first))
    assert cache.nbytes == 3 * nbytes
    assert cache.nearest(TOKENS)[1] == 5
    assert [cache.nearest([first])[1] for first in range(10)] == [0] * 8 + [1] * 2


def test_only_preambles_are_kept_on_disk_for_the_next_process(tmp_path: Path) -> None:
    def open_cache() -> PrefixCache:
        return PrefixCache(store=PrefixStore(tmp_path / "store", 1 << 30, "a" * 32))

    cache = open_cache()
    cache.keep_prefix(TOKENS[:10], attention(10), "system")
    cache.keep_prefix(TOKENS[:20], attention(20), "user")
    cache.keep(TOKENS[:30], attention(30))
    restarted = open_cache()
    found, seen = restarted.nearest(TOKENS)
    assert found and seen == 10 and found[0].offset == 10
    # It is in memory now, too.
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    assert restarted.nearest(TOKENS)[1] == 10


def test_a_disk_that_fails_is_logged_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no space left")

    store = PrefixStore(tmp_path / "store", 1 << 30, "a" * 32)
    cache = PrefixCache(store=store)
    monkeypatch.setattr(store, "store", fail)
    monkeypatch.setattr(store, "longest", fail)
    with caplog.at_level(logging.WARNING):
        cache.keep_prefix(TOKENS, linear(1), "system")
        assert cache.nearest(TOKENS)[1] == len(TOKENS)
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot {what} the prefix cache on disk: no space left" for what in ("write", "read")
    ]
