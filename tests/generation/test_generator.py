"""Prefill in chunks, with cached prefixes, cancellation and progress."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx.generation.generator import Context, Generator
from flashmoe_mlx.generation.prefix_cache import Kind, PrefixCache
from flashmoe_mlx.model import info
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT, resident, streamed

FAMILIES = ["qwen3_5_moe", "qwen3_moe", "gpt_oss"]
"""Linear attention, attention alone, and sliding windows."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, checkpoint: WriteFamily) -> Path:
    return checkpoint(request.param)


def generator(folder: Path, step_size: int = 8) -> Generator:
    return Generator(streamed(folder), load_tokenizer(folder), PrefixCache(), step_size)


def answer(
    generator: Generator, prompt: list[int], keep: Mapping[int, Kind] | None = None
) -> tuple[Context, list[int]]:
    context = generator.prefill(prompt, keep or {})
    return context, [response.token for response in generator.decode(context, 8)]


def expected(folder: Path, prompt: list[int]) -> list[int]:
    """mlx-lm's own tokens, up to the end of the answer."""
    ends, tokens = load_tokenizer(folder).eos_token_ids, []
    for token, _ in generate_step(mx.array(prompt), resident(folder), max_tokens=8):
        tokens.append(int(token))
        if token in ends:
            break
    return tokens


def test_a_prompt_goes_on_from_the_state_after_the_last_answer(folder: Path) -> None:
    text = generator(folder)
    first, tokens = answer(text, PROMPT)
    assert first.cached_tokens == 0 and tokens == expected(folder, PROMPT)
    assert first.tokens == PROMPT + tokens
    longer = [*first.tokens, *PROMPT]
    second, tokens = answer(text, longer)
    assert second.cached_tokens == len(first.tokens) and tokens == expected(folder, longer)


def test_a_prompt_goes_on_from_a_kept_prefix(folder: Path) -> None:
    """Also if the state can be rolled back, and so was not kept."""
    text = generator(folder)
    answer(text, PROMPT, {13: "system"})
    other = [*PROMPT[:13], 7, 7, 7]
    context, tokens = answer(text, other)
    assert context.cached_tokens == 13 and tokens == expected(folder, other)


def test_the_last_token_is_always_computed(folder: Path) -> None:
    text = generator(folder)
    answer(text, PROMPT, {len(PROMPT) - 1: "user"})
    context, tokens = answer(text, PROMPT)
    # mlx-lm computes one more token after it has trimmed a state.
    assert len(PROMPT) - 2 <= context.cached_tokens < len(PROMPT)
    assert tokens == expected(folder, PROMPT)


def test_progress_counts_only_what_is_computed(folder: Path) -> None:
    text, seen = generator(folder), []
    text.prefill(PROMPT, {13: "system"}, progress=lambda *numbers: seen.append(numbers))
    # A state that serves every prefix needs no chunk that ends at one.
    ends = (0, 8, 16, 19) if "qwen3_moe" in str(folder) else (0, 8, 13, 19)
    assert seen == [(end, 19) for end in ends]
    seen.clear()
    context, _ = answer(text, PROMPT)
    text.prefill([*context.tokens, 3, 4], {}, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(0, 1), (1, 1)]


def test_chunks_shrink_with_the_context(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 heads of 4 bytes and 256 tokens a chunk: half of the memory holds the scores of a context of 1,024 tokens."""
    text = Generator(streamed(checkpoint("qwen3_moe")), load_tokenizer(checkpoint("qwen3_moe")), PrefixCache())
    room = 2 * 16 * 256 * 1024
    monkeypatch.setattr(info, "memory_reserve", lambda: room)
    monkeypatch.setattr(info, "available_memory", lambda: 0)
    seen: list[int] = []
    text.prefill([7] * 2801, {}, progress=lambda processed, total: seen.append(processed))
    assert seen == [0, 512, 768, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920, *range(2048, 2800, 64), 2800]


def test_a_cancelled_prefill_ends_after_its_chunk(folder: Path) -> None:
    text, seen = generator(folder), []
    text.prefill(PROMPT, {}, cancelled=lambda: len(seen) == 1, progress=lambda processed, total: seen.append(processed))
    assert seen == [0, 8]
    assert text.prefixes.nbytes == 0


def test_a_stopped_answer_ends_with_its_token(folder: Path) -> None:
    text = generator(folder)
    context = text.prefill(PROMPT, {})
    responses = list(text.decode(context, 8, stopped=lambda: len(context.tokens) == len(PROMPT) + 2))
    assert [response.finish_reason for response in responses] == [None, "stop"]
    assert text.prefixes.nearest(context.tokens)[1] == len(context.tokens)
