"""Jobs on the worker's thread: their order, their limits, and what happens to them when one fails or all must end."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx import load
from flashmoe_mlx.generation.job import Answer, Job
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.generation.worker import QueueFull, Worker, WorkerClosed
from tests.conftest import WriteFamily
from tests.support.oracle import PROMPT


@pytest.fixture(scope="module")
def folder(checkpoint: WriteFamily) -> Path:
    return checkpoint("qwen3_5_moe")


@contextmanager
def working(folder: Path, count: Callable[..., None] = lambda **_: None, **options: Any) -> Iterator[Worker]:
    options = {"max_queue": 2, "prefix_cache_bytes": 10**9} | options
    worker = Worker(lambda: load(str(folder)), count, **options)
    try:
        yield worker
    finally:
        worker.close(0)


def job(max_tokens: int = 4, **options: Any) -> Job:
    """A job that does not end before ``max_tokens``."""
    return Job(Prompt(PROMPT), max_tokens, penalties={"logit_bias": {2: -100}}, **options)


def ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens(60) if token is not None]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_jobs_run_one_at_a_time_in_order(folder: Path) -> None:
    with working(folder) as worker:
        first, second = worker.submit(job(8)), worker.submit(job(4))
        assert worker.gauges()["running_requests"] == worker.gauges()["waiting_requests"] == 1
        assert ids(second) == ids(first)[:4]
        wait_until(lambda: worker.idle)


def test_a_full_queue_refuses_until_a_waiting_job_is_cancelled(folder: Path) -> None:
    with working(folder, max_queue=1) as worker:
        running, waiting = worker.submit(job(10**4)), worker.submit(job())
        with pytest.raises(QueueFull, match="1 jobs are waiting") as refused:
            worker.submit(job())
        assert refused.value.max_queue == 1
        waiting.cancel()
        last = worker.submit(job())
        running.cancel()
        assert len(ids(last)) == 4 and ids(waiting) == []


def test_closing_ends_every_answer_with_its_reason(folder: Path) -> None:
    with working(folder) as worker:
        answers = [worker.submit(job(10**4)), worker.submit(job())]
        assert next(answers[0].tokens(60))
        worker.close(0.1)
        for answer in answers:
            with pytest.raises(WorkerClosed):
                ids(answer)
        with pytest.raises(WorkerClosed):
            worker.submit(job())


def test_an_error_ends_one_answer_only(folder: Path) -> None:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ValueError("no such word")

    total: Counter[str] = Counter()
    with working(folder, lambda **amounts: total.update(amounts)) as worker:
        broken, whole = worker.submit(job(constraints=[fail])), worker.submit(job())
        with pytest.raises(ValueError, match="no such word"):
            ids(broken)
        assert len(ids(whole)) == 4
    assert total["generation_errors"] == 1 and total["generated_tokens"] == 4


def test_tokens_are_counted(folder: Path) -> None:
    total: Counter[str] = Counter()
    with working(folder, lambda **amounts: total.update(amounts)) as worker:
        ids(worker.submit(job()))
        wait_until(lambda: worker.idle)
    seconds = {name: total.pop(name) for name in ("first_token_seconds", "generation_seconds")}
    assert 0 < seconds["first_token_seconds"] <= seconds["generation_seconds"]
    assert total == {"prompt_tokens": len(PROMPT), "cached_prompt_tokens": 0, "generated_tokens": 4}


@pytest.mark.parametrize(("min_prefix", "cached"), [(10, 10), (11, 0)])
def test_prefixes_are_kept_from_a_length_on(folder: Path, min_prefix: int, cached: int) -> None:
    with working(folder, min_prefix=min_prefix) as worker:
        ids(worker.submit(Job(Prompt(PROMPT, preamble=10), 2)))
        answer = worker.submit(Job(Prompt([*PROMPT[:10], 7, 7, 7]), 2))
        ids(answer)
        assert answer.cached_tokens == cached


def test_a_seed_fixes_the_answer(folder: Path) -> None:
    sampling = {"temp": 2.0}
    with working(folder) as worker:
        answers = [ids(worker.submit(job(12, sampling=sampling, seed=seed))) for seed in (7, 7, -8)]
    assert answers[0] == answers[1] != answers[2]


def test_the_most_likely_tokens_come_with_their_logprobs(folder: Path) -> None:
    with working(folder) as worker:
        tokens = [token for token in worker.submit(job(top_logprobs=3)).tokens(60) if token]
    for token in tokens:
        assert token.top_logprobs[0] == (token.id, token.logprob)
        assert len(token.top_logprobs) == 3
        assert sorted(token.top_logprobs, key=lambda pair: -pair[1]) == list(token.top_logprobs)
    assert [token.finish_reason for token in tokens] == [None, None, None, "length"]


def test_an_error_of_loading_is_raised() -> None:
    def fail() -> Any:
        raise FileNotFoundError("no such folder")

    with pytest.raises(FileNotFoundError, match="no such folder"):
        Worker(fail, lambda **_: None, 1, 0)


@pytest.mark.parametrize(("family", "group_size"), [("gpt_oss", 32), ("deepseek_v3", 32), ("qwen3_5_moe", 64)])
def test_a_kv_cache_that_cannot_be_quantized_is_refused_at_the_start(
    checkpoint: WriteFamily, family: str, group_size: int
) -> None:
    kv_cache = {"kv_bits": 8, "kv_group_size": group_size, "quantized_kv_start": 5000}
    with (
        pytest.raises(ValueError, match=f"--kv-bits 8 with --kv-group-size {group_size} does not work"),
        working(checkpoint(family), kv_cache=kv_cache),
    ):
        pass


def test_only_full_attention_is_quantized_beside_sliding_windows(checkpoint: WriteFamily) -> None:
    kv_cache = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    with working(checkpoint("gemma4_text"), kv_cache=kv_cache) as worker:
        assert len(ids(worker.submit(job()))) == 4


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "qwen3_5_moe", "qwen3_moe"])
def test_a_conversation_longer_than_a_window_continues_from_its_question(checkpoint: WriteFamily, family: str) -> None:
    """Templates write an answer in another way once there is the next question."""
    folder = checkpoint(family)
    question = [(37 * i * i + 11) % 300 for i in range(200)]
    again = [*question, 5, 6, 7, 8]
    with working(folder, min_prefix=64) as worker, working(folder, prefix_cache_bytes=0) as forgetful:
        ids(worker.submit(Job(Prompt(question, answer_start=len(question) - 1), 8)))
        for _ in range(2):
            answer, expected = (each.submit(Job(Prompt(again, answer_start=203), 8)) for each in (worker, forgetful))
            assert ids(answer) == ids(expected)
            assert answer.cached_tokens >= len(question) - 1 and expected.cached_tokens == 0
