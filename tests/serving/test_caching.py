"""State of earlier prompts: it saves prefill and does not change answers."""

from typing import Any

import pytest
from mlx_lm.models.cache import QuantizedKVCache

from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.model.info import Streaming
from tests.support.serving import DEFINITION, HERON, Running, serve


def test_a_shared_system_message_is_prefilled_once() -> None:
    system = {"role": "system", "content": "You are a pocket dictionary. " * 6}
    with serve(min_prefix=32) as running, serve(min_prefix=32, prefix_cache_bytes=0) as forgetful:
        for word in ("heron", "sofa"):
            question = {"messages": [system, {"role": "user", "content": f"What is a {word}?"}], "max_tokens": 3}
            answer, expected = running.chat(**question)[1], forgetful.chat(**question)[1]
            assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            total = answer["usage"]["prompt_tokens"]
            assert cached == 0 if word == "heron" else total - 20 < cached < total
            assert expected["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_conversation_continues_from_its_cached_state(running: Running) -> None:
    messages: list[dict[str, str]] = []
    for word in ("heron", "sofa"):
        messages.append({"role": "user", "content": f"What is a {word}?"})
        answer = running.chat(messages=messages)[1]
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    # The first question has 20 tokens, its answer 25.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 + 25


def test_a_quantized_cache_is_used_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    nearest = PrefixCache.nearest
    monkeypatch.setattr(PrefixCache, "nearest", lambda *args: found.append(nearest(*args)) or found[-1])
    cache = {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 0}
    with serve(kv_cache=cache) as running:
        message = running.chat(messages=HERON)[1]["choices"][0]["message"]
        assert message["content"] == DEFINITION
        assert running.chat(messages=[*HERON, message, *HERON])[0] == 200
    kept, tokens = found[-1]
    assert tokens and any(isinstance(layer, QuantizedKVCache) for layer in kept)


def test_the_context_limit_counts_the_quantized_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    reckoned: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Streaming, "refuse_context", lambda _, *context: reckoned.append(context))
    with serve(kv_cache={"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}) as running:
        assert running.chat(messages=HERON, max_tokens=2)[0] == 200
    assert reckoned == [(20 + 2, 8, 32)]
