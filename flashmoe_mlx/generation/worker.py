"""The thread that loads a model and runs one job after the other on it."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Processor
from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.job import Answer, Job, Token
from flashmoe_mlx.generation.kv_cache import check_quantization
from flashmoe_mlx.generation.prefix_cache import Kind, PrefixCache
from flashmoe_mlx.generation.prefix_store import PrefixStore
from flashmoe_mlx.system.daemon_threads import DaemonThreads


class QueueFull(Exception):
    """A job was rejected because too many are waiting.

    Args:
        max_queue (int): How many may wait.
    """

    def __init__(self, max_queue: int):
        super().__init__(f"{max_queue} jobs are waiting already: try again later")
        self.max_queue = max_queue


class WorkerClosed(Exception):
    """The worker was closed, so a job was rejected or its answer ended early."""

    def __init__(self) -> None:
        super().__init__("the model is shutting down")


class Worker:
    """Loads a model on a thread of its own and runs jobs there, because MLX arrays belong to the thread that made them.

    Jobs run one at a time, in the order they were submitted: a batch would need the experts of all its jobs at once,
    and its rounding would make an answer depend on the other jobs.

    Args:
        load (Callable): Returns model and tokenizer, as :func:`flashmoe_mlx.load` does.
        count (Callable): Adds to totals, given as keyword arguments, e.g. ``count(prompt_tokens=3)``. Called on the
            worker's thread.
        max_queue (int): How many jobs may wait while one runs.
        prefix_cache_bytes (int): Memory for the prefix cache.
        prefill_step_size (int, optional): Tokens in a prefill chunk. Default: as the loaded model suggests.
        kv_cache (dict, optional): mlx-lm's ``kv_bits``, ``kv_group_size`` and ``quantized_kv_start``. Default: the KV
            cache is not quantized.
        open_prefix_store (Callable, optional): Returns the prefix store on disk for the loaded model. Default: prefixes
            are kept in memory only.
        min_prefix (int): Tokens: a shorter prefix is cheap to prefill again, and its state is not kept. Default:
            ``512``.

    Attributes:
        model (nn.Module): The loaded model. Other threads may use only its ``streaming``.
        tokenizer (TokenizerWrapper): The loaded tokenizer.
        prefixes (PrefixCache): The prefix cache. Other threads may use it only while the worker is idle.
        closed (bool): No more jobs are accepted.

    Raises:
        ValueError: The model's KV cache cannot be quantized.
        Exception: Any error of ``load`` or ``open_prefix_store``.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[Any]],
        count: Callable[..., None],
        max_queue: int,
        prefix_cache_bytes: int,
        prefill_step_size: int | None = None,
        kv_cache: Mapping[str, Any] | None = None,
        open_prefix_store: Callable[[nn.Module], PrefixStore] | None = None,
        min_prefix: int = 512,
    ):
        self._count, self._max_queue, self._min_prefix = count, max_queue, min_prefix
        self._lock = threading.Lock()
        # The first one runs, the others wait.
        self._accepted: list[Answer] = []
        self.closed = False
        self._thread = DaemonThreads(1, "generation")
        loaded: Future[Sequence[Any]] = Future()
        self._thread.submit(lambda: _fulfill(loaded, lambda: _load(load, kv_cache or {})))
        self.model: nn.Module
        self.tokenizer: TokenizerWrapper
        self.model, self.tokenizer = loaded.result()[:2]
        store = open_prefix_store and open_prefix_store(self.model)
        self.prefixes = PrefixCache(max_bytes=prefix_cache_bytes, store=store)
        self._generator = Generator(self.model, self.tokenizer, self.prefixes, prefill_step_size, kv_cache)

    @property
    def idle(self) -> bool:
        """No job is running or waiting."""
        return not self._accepted

    def submit(self, job: Job) -> Answer:
        """Queue a job.

        Raises:
            QueueFull: ``max_queue`` jobs are waiting already.
            WorkerClosed: The worker accepts no more jobs.
        """
        with self._lock:
            if self.closed:
                raise WorkerClosed
            if self._wanted() > self._max_queue:
                raise QueueFull(self._max_queue)
            answer = Answer(job)
            self._accepted.append(answer)
        self._thread.submit(lambda: self._run(answer))
        return answer

    def refuse_context(self, tokens: int) -> None:
        """Refuse a context whose KV cache would not fit in memory.

        Args:
            tokens (int): Length of prompt and answer together.

        Raises:
            MemoryError: It does not fit.
        """
        self._generator.refuse_context(tokens)

    def gauges(self) -> dict[str, float]:
        """Return the numbers of waiting and running jobs, and the bytes of the prefix cache."""
        with self._lock:
            wanted = self._wanted()
        return {
            "waiting_requests": max(0, wanted - 1),
            "running_requests": min(1, wanted),
            "prefix_bytes": self.prefixes.nbytes,
        }

    def close(self, timeout: float) -> None:
        """Accept no more jobs, cancel those that wait, and the running one if it does not end in time.

        Args:
            timeout (float): Seconds that the running job may still take.
        """
        with self._lock:
            self.closed = True
            running, waiting = self._accepted[:1], self._accepted[1:]
        for answer in waiting:
            answer.put(WorkerClosed())
            answer.cancel()
        deadline = time.perf_counter() + timeout
        while not self.idle and time.perf_counter() < deadline:
            time.sleep(0.02)
        for answer in running:
            answer.put(WorkerClosed())
            answer.cancel()
        self._thread.close(deadline + 2)

    def _wanted(self) -> int:
        """Count the answers that somebody reads; cancelled ones end as soon as it is their turn."""
        return sum(not answer.cancelled for answer in self._accepted)

    def _run(self, answer: Answer) -> None:
        began = time.perf_counter()
        try:
            if not answer.cancelled:
                for token in self._generate(answer):
                    answer.put(token)
        # An error ends this answer only; the next job runs.
        except Exception as error:
            self._count(generation_errors=1)
            answer.put(error)
        finally:
            self._count(generation_seconds=time.perf_counter() - began)
            with self._lock:
                self._accepted.remove(answer)
            answer.put(None)

    def _generate(self, answer: Answer) -> Iterator[Token]:
        job, prompt = answer.job, answer.job.prompt
        mx.random.seed(secrets.randbits(63) if job.seed is None else job.seed % 2**64)
        kinds: dict[int, Kind] = {prompt.answer_start: "user", prompt.preamble: "system"}
        keep = {length: kind for length, kind in kinds.items() if length >= self._min_prefix}
        context = self._generator.prefill(prompt.tokens, keep, cancelled=lambda: answer.cancelled)
        answer.cached_tokens = context.cached_tokens
        if answer.cancelled:
            return
        self._count(prompt_tokens=len(prompt.tokens), cached_prompt_tokens=answer.cached_tokens)
        before = mx.array(prompt.tokens[:-1], mx.int32)
        penalties = [_after(before, penalty) for penalty in make_logits_processors(**job.penalties)]
        responses = self._generator.decode(
            context,
            job.max_tokens,
            sampler=make_sampler(**job.sampling),
            logits_processors=[*penalties, *job.constraints],
            stopped=lambda: answer.cancelled,
        )
        for index, response in enumerate(responses):
            if index == 0:
                self._count(first_token_seconds=time.perf_counter() - answer.submitted)
            self._count(generated_tokens=1)
            logprob = _finite(response.logprobs[response.token].item())
            top = _top_logprobs(response.logprobs, job.top_logprobs)
            yield Token(response.text, response.token, logprob, top, response.finish_reason)


def _load(load: Callable[[], Sequence[Any]], kv_cache: Mapping[str, Any]) -> Sequence[Any]:
    """Load a model, and refuse settings of the KV cache that would fail in every answer."""
    loaded = load()
    check_quantization(loaded[0], kv_cache.get("kv_bits"), kv_cache.get("kv_group_size", 64))
    return loaded


def _fulfill(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _after(before: mx.array, processor: Processor) -> Processor:
    """Return a processor that sees the whole prompt, of which mlx-lm gets only the last token."""
    return lambda tokens, logits: processor(mx.concatenate([before, tokens.astype(before.dtype)]), logits)


def _top_logprobs(logprobs: mx.array, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    values = np.array(logprobs.astype(mx.float32))
    return tuple((int(token), _finite(values[token])) for token in np.argsort(-values, kind="stable")[:count])


def _finite(logprob: float) -> float:
    """Return a number that JSON can hold; OpenAI's API reports -9999 for impossible tokens."""
    return max(float(logprob), -9999.0)
