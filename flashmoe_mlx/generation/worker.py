"""The model's one thread: requests take turns on it, in the order they came."""

import copy
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, stream_generate, wired_limit
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Processor
from flashmoe_mlx.generation.job import Generation, Order, Token
from flashmoe_mlx.generation.prefix_store import Prefixes
from flashmoe_mlx.serving.errors import Refusal
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.system.daemon_threads import DaemonThreads


class Generations:
    """Loads a model on a thread of its own, and runs it there: MLX's arrays belong to the thread that made them.

    One request at a time: a batch would need the experts of all its requests at once, and round differently.

    Args:
        load (Callable): gives model and tokenizer, like :func:`flashmoe_mlx.load`.
        metrics (Metrics): what happens is counted there.
        most_waiting (int): requests, besides the one that runs.
        prefix_bytes (int): memory for the state of prompts that may come again.
        prefill_step_size (int, optional): tokens of a prompt at a time. Default: what the model's loading chose.
        kv_cache (dict, optional): mlx-lm's settings of a quantised KV cache. Default: it is not.
        on_disk (Callable, optional): gives the loaded model's store of preambles. Default: memory keeps them alone.

    Attributes:
        model (nn.Module): the loaded model. Only its ``streaming`` may be used on other threads.
        tokenizer (TokenizerWrapper): the loaded tokenizer.
        closed (bool): it takes no more requests.

    Raises:
        Exception: what ``load`` raises.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[Any]],
        metrics: Metrics,
        most_waiting: int,
        prefix_bytes: int,
        prefill_step_size: int | None = None,
        kv_cache: dict[str, Any] | None = None,
        on_disk: Callable[[nn.Module], Prefixes] | None = None,
    ):
        self._metrics = metrics
        self._most_waiting = most_waiting
        self._kv_cache = kv_cache or {"kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0}
        self._lock = threading.Lock()
        self._accepted: list[Generation] = []  # the first one runs
        self.closed = False
        self._prefixes = LRUPromptCache(max_size=1024, max_bytes=prefix_bytes)
        self._thread = DaemonThreads(1, "generation")
        loaded: Future[Sequence[Any]] = Future()
        self._thread.submit(lambda: _settle(loaded, load))
        self.model: nn.Module
        self.tokenizer: TokenizerWrapper
        self.model, self.tokenizer = loaded.result()[:2]
        self._on_disk = on_disk and on_disk(self.model)
        self._step = prefill_step_size or self.model.streaming.prefill_step_size

    def submit(self, order: Order) -> Generation:
        """Queue an order.

        Raises:
            Refusal: too many wait already, or it is closed.
        """
        with self._lock:
            if self.closed:
                raise Refusal(503, "The server is shutting down.")
            if self._wanted() > self._most_waiting:
                raise Refusal(429, f"{self._most_waiting} requests are waiting already.", code="rate_limit_exceeded")
            generation = Generation(order)
            self._accepted.append(generation)
        self._thread.submit(lambda: self._run(generation))
        return generation

    def refuse_context(self, tokens: int) -> None:
        """Refuse a context that memory cannot hold, with the KV cache as it is here.

        Args:
            tokens (int): of prompt and answer.

        Raises:
            MemoryError: it does not fit.
        """
        self.model.streaming.refuse_context(tokens, self._kv_cache["kv_bits"], self._kv_cache["kv_group_size"])

    def gauges(self) -> dict[str, float]:
        """How many requests wait and run, and the bytes of kept prefixes."""
        with self._lock:
            wanted = self._wanted()
        return {
            "waiting_requests": max(0, wanted - 1),
            "running_requests": min(1, wanted),
            "prefix_bytes": self._prefixes.nbytes,
        }

    def close(self, patience: float) -> None:
        """Take no more requests; cancel those that wait, and the one that runs if it has not ended by itself then.

        Args:
            patience (float): seconds for it.
        """
        with self._lock:
            self.closed = True
            running, waiting = self._accepted[:1], self._accepted[1:]
        for generation in waiting:
            generation.put(Refusal(503, "The server is shutting down."))
            generation.cancel()
        deadline = time.perf_counter() + patience
        while self._accepted and time.perf_counter() < deadline:
            time.sleep(0.02)
        for generation in running:
            generation.put(Refusal(503, "The server is shutting down."))
            generation.cancel()
        self._thread.close(deadline + 2)

    def _wanted(self) -> int:
        """Requests that somebody waits for; the others end once it is their turn."""
        return sum(not generation.cancelled for generation in self._accepted)

    def _run(self, generation: Generation) -> None:
        begin = time.perf_counter()
        try:
            if not generation.cancelled:
                for token in self._generate(generation):
                    generation.put(token)
        except Exception as error:  # this request's; the next one works
            self._metrics.add(generation_errors=1)
            generation.put(error)
        finally:
            self._metrics.add(generation_seconds=time.perf_counter() - begin)
            with self._lock:
                self._accepted.remove(generation)
            generation.put(None)

    def _generate(self, generation: Generation) -> Iterator[Token]:
        order = generation.order
        prompt = list(order.prompt)
        mx.random.seed(secrets.randbits(63) if order.seed is None else order.seed % 2**64)
        cache, generation.cached_tokens = self._nearest(prompt[:-1])  # the last one is always computed
        with wired_limit(self.model, [generation_stream]), mx.stream(generation_stream):  # as mlx-lm generates
            self._prefill(generation, prompt, cache)
        if generation.cancelled:
            return
        self._metrics.add(prompt_tokens=len(prompt), cached_prompt_tokens=generation.cached_tokens)
        before = mx.array(prompt[:-1], mx.int32)
        processors = [_after(before, penalty) for penalty in make_logits_processors(**order.penalties)]
        responses = stream_generate(
            self.model,
            self.tokenizer,
            prompt[-1:],
            max_tokens=order.max_tokens,
            sampler=make_sampler(**order.sampling),
            logits_processors=[*processors, *order.constraints],
            prompt_cache=cache,
            **self._kv_cache,
        )
        for count, response in enumerate(responses):
            if count == 0:
                self._metrics.add(first_token_seconds=time.perf_counter() - generation.began)
            self._metrics.add(generated_tokens=1)
            prompt.append(response.token)
            logprob = _finite(response.logprobs[response.token].item())
            top = _likeliest(response.logprobs, order.top_logprobs)
            yield Token(response.text, response.token, logprob, top, response.finish_reason)
            if generation.cancelled:
                break
        self._prefixes.insert_cache(None, prompt, cache)  # it has seen every token so far

    def _nearest(self, prompt: list[int]) -> tuple[list[Any], int]:
        """The state that can be gone on from with the fewest tokens left, and how many it has seen."""
        cache, rest = self._prefixes.fetch_nearest_cache(None, prompt)
        seen = len(prompt) - len(rest)
        try:
            found = self._on_disk and self._on_disk.longest(prompt, beyond=seen)
        except OSError as error:
            logging.warning("cannot look for a preamble on disk: %s", error)
            found = None
        if found:
            cache, seen = found
            self._prefixes.insert_cache(None, prompt[:seen], copy.deepcopy(cache), cache_type="system")
        return cache or make_prompt_cache(self.model), seen

    def _keep_on_disk(self, preamble: list[int], cache: list[Any]) -> None:
        try:
            if self._on_disk is not None:
                self._on_disk.store(preamble, cache)
        except OSError as error:  # the answer does not depend on it
            logging.warning("cannot keep a preamble: %s", error)

    def _prefill(self, generation: Generation, prompt: list[int], cache: list[Any]) -> None:
        """Read all of the prompt but its last token, in chunks that end where other prompts may go another way."""
        position, end = generation.cached_tokens, len(prompt) - 1
        cuts = set() if can_trim_prompt_cache(cache) else set(generation.order.beginnings)
        preamble = generation.order.preamble if self._on_disk is not None else 0
        cuts |= {preamble}
        while position < end and not generation.cancelled:
            stop = min([position + self._step, end, *(cut for cut in cuts if cut > position)])
            self.model(mx.array(prompt[position:stop])[None], cache=cache)
            maybe_quantize_kv_cache(cache, **self._kv_cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
            position = stop
            if position in cuts:  # a system's state is kept longest
                self._prefixes.insert_cache(None, prompt[:position], copy.deepcopy(cache), cache_type="system")
            if position == preamble:
                self._keep_on_disk(prompt[:position], cache)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _after(before: mx.array, processor: Processor) -> Processor:
    """A processor that sees the whole prompt, of which mlx-lm is only given the last token."""
    return lambda tokens, logits: processor(mx.concatenate([before, tokens.astype(before.dtype)]), logits)


def _likeliest(logprobs: mx.array, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    values = np.array(logprobs.astype(mx.float32))
    return tuple((int(token), _finite(values[token])) for token in np.argsort(-values, kind="stable")[:count])


def _finite(logprob: float) -> float:
    """What is impossible has no logprob that JSON could hold; this is OpenAI's number for it."""
    return max(float(logprob), -9999.0)
