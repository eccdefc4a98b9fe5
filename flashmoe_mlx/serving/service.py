"""A loaded model that answers requests."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe_mlx import constrain
from flashmoe_mlx.generation.job import Answer, Job
from flashmoe_mlx.generation.worker import Worker
from flashmoe_mlx.serving.errors import ApiError, sentence, worker_errors
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.openai.request import make_job
from flashmoe_mlx.serving.openai.schema import Request


@dataclass(frozen=True)
class Limits:
    """Upper limits of a request.

    Args:
        prompt_tokens (int): Length of the longest prompt.
        completion_tokens (int): Largest ``max_tokens``.
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
        self._vocabulary = constrain.vocabulary_of(self.tokenizer)
        if self.tokenizer.has_tool_calling and not constrain.can_constrain_calls(self.tokenizer):
            logging.warning("tool calls of this model cannot be constrained to their schemas: they may fail to parse")
        self._created = int(time.time())
        # Some tokenizers change their state for a moment while they encode.
        self._tokenizing = threading.Lock()

    def start(self, request: Request) -> Answer:
        """Queue a request.

        Raises:
            ApiError: It exceeds a limit, the model does not support it, or the queue is full or closed.
        """
        with self._tokenizing:
            job = make_job(request, self.tokenizer, self._vocabulary, self._template_options)
        self._check_limits(request, job)
        with worker_errors():
            return self._worker.submit(job)

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

    def _check_limits(self, request: Request, job: Job) -> None:
        tokens, vocabulary, limits = len(job.prompt.tokens), len(self.tokenizer), self._limits
        if tokens > limits.prompt_tokens:
            message = f"The prompt has {tokens:,} tokens; the limit is {limits.prompt_tokens:,}."
            raise ApiError(400, message, request.prompt_field, "context_length_exceeded")
        if request.max_tokens > limits.completion_tokens:
            message = f"max_tokens is {request.max_tokens:,}; the limit is {limits.completion_tokens:,}."
            raise ApiError(400, message, "max_tokens")
        if not all(0 <= token < vocabulary for token in request.logit_bias):
            message = f"logit_bias has a token outside the vocabulary of {vocabulary:,} tokens."
            raise ApiError(400, message, "logit_bias")
        try:
            self._worker.refuse_context(tokens + request.max_tokens)
        except MemoryError as error:
            message = sentence(str(error))
            raise ApiError(400, message, request.prompt_field, "context_length_exceeded") from error
