"""A loaded model that answers requests."""

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashmoe_mlx import constrain
from flashmoe_mlx.generation.job import Answer, Job
from flashmoe_mlx.generation.worker import Worker
from flashmoe_mlx.serving.errors import ApiError, worker_errors
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.openai.request import make_jobs
from flashmoe_mlx.serving.openai.schema import Request

# The field of config.json.
_POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Limits:
    """Upper limits of a request.

    Args:
        prompt_tokens (int): Length of the longest prompt.
        completion_tokens (int): Length of the longest answer, whatever ``max_tokens`` says.
    """

    prompt_tokens: int
    completion_tokens: int


class Service:
    """Answers requests with one model, whatever model name they give: no request loads another.

    Args:
        name (str): The model's name in answers.
        worker (Worker): Generates the answers.
        metrics (Metrics): The server's counters.
        limits (Limits): Upper limits of a request.
        defaults (Mapping): Values of request fields that have no default of OpenAI's.
        template_options (Mapping): Variables of the chat template, unless a request sets them.

    Attributes:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        vocabulary (LLTokenizer): The same for constraints. It knows the bytes of each token.
    """

    def __init__(
        self,
        name: str,
        worker: Worker,
        metrics: Metrics,
        limits: Limits,
        defaults: Mapping[str, Any],
        template_options: Mapping[str, Any],
    ):
        self.name = name
        self.metrics = metrics
        self.defaults = defaults
        self.tokenizer = worker.tokenizer
        self._worker = worker
        self._limits = limits
        self._template_options = template_options
        self.vocabulary = constrain.vocabulary_of(self.tokenizer)
        if self.tokenizer.has_tool_calling and not constrain.can_constrain_calls(self.tokenizer):
            logging.warning("tool calls of this model cannot be constrained to their schemas: they may fail to parse")
        self._context_length = _context_length(worker.model)
        self._created = int(time.time())
        # Some tokenizers change their state for a moment while they encode.
        self._tokenizing = threading.Lock()

    def start(self, request: Request) -> list[Answer]:
        """Queue a request, with one answer for each of its prompts.

        Raises:
            ApiError: It exceeds a limit, the model does not support it, or the queue is full or closed.
        """
        with self._tokenizing:
            jobs = make_jobs(request, self.tokenizer, self.vocabulary, self._template_options)
        vocabulary = len(self.tokenizer)
        if not all(0 <= token < vocabulary for token in request.logit_bias):
            message = f"logit_bias has a token outside the vocabulary of {vocabulary:,} tokens."
            raise ApiError(400, message, "logit_bias")
        jobs = [replace(job, max_tokens=self._max_tokens(request, job)) for job in jobs]
        with worker_errors():
            return self._worker.submit_all(jobs)

    @property
    def healthy(self) -> bool:
        """Requests are accepted."""
        return not self._worker.closed

    def model(self) -> dict[str, Any]:
        """Return the description of the model, in the shape of OpenAI's API."""
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "local"}

    def metrics_text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        return self.metrics.text(self._worker.model.streaming.counters, self._worker.gauges())

    def _max_tokens(self, request: Request, job: Job) -> int:
        """Return the length limit of an answer: as asked for, but not more than fits.

        Raises:
            ApiError: The prompt is too long.
        """
        prompt, most = len(job.prompt.tokens), self._limits.completion_tokens
        if prompt > self._limits.prompt_tokens:
            raise _too_long(prompt, self._limits.prompt_tokens, request)
        wanted = most if job.max_tokens < 0 else job.max_tokens
        if job.max_tokens < 0 and self._context_length > prompt:
            wanted = min(wanted, self._context_length - prompt)
        fitting = min(wanted, most)
        if not self._fits(prompt + fitting):
            # The longest context that fits: one token less than the shortest one that does not.
            context = bisect_left(range(prompt + fitting), True, key=lambda tokens: not self._fits(tokens)) - 1
            if context <= prompt:
                raise _too_long(prompt, max(0, context), request)
            fitting = context - prompt
        if fitting < job.max_tokens:
            logging.warning("max_tokens is %d: the answer may have %d tokens at most", job.max_tokens, fitting)
        return fitting

    def _fits(self, tokens: int) -> bool:
        """Say whether a context fits in memory."""
        try:
            self._worker.refuse_context(tokens)
        except MemoryError:
            return False
        return True


def _too_long(tokens: int, most: int, request: Request) -> ApiError:
    # Programs recognize an overflow by these words: both halves, and numbers without separators.
    message = f"prompt is too long: {tokens} tokens > {most} maximum"
    message += f"; this model's maximum context length is {most} tokens"
    return ApiError(400, message, request.prompt_field, "context_length_exceeded")


def _context_length(model: Any) -> int:
    """Return how many positions a model was made for; 0 if its config does not say."""
    args = getattr(model, "args", None)
    for config in (getattr(args, "text_config", None), args):
        length = config.get(_POSITIONS) if isinstance(config, Mapping) else getattr(config, _POSITIONS, None)
        if isinstance(length, int) and length > 0:
            return length
    return 0
