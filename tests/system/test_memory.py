"""Questions about memory, and the limit of MLX's cache."""

import mlx.core as mx

from flashmoe_mlx.system.memory import available_memory, limit_cache, memory_reserve, total_memory


def test_less_is_available_than_there_is() -> None:
    assert 0 < available_memory() < total_memory()
    assert 32 * memory_reserve() <= total_memory()


def test_cache_limit_is_lowered_to_the_reserve_and_never_raised() -> None:
    before = mx.set_cache_limit(1 << 50)
    try:
        limit_cache()
        assert mx.set_cache_limit(1000) == memory_reserve()
        limit_cache()
        assert mx.set_cache_limit(before) == 1000
    finally:
        mx.set_cache_limit(before)
