"""A loaded model that answers requests."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from flashmoe_mlx import constrain
from flashmoe_mlx.generation.job import Answer, Job
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.generation.worker import QueueFull, Worker, WorkerClosed
from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.openai.request import thinking_options
from flashmoe_mlx.serving.openai.schema import ChatRequest, JsonFormat, Request, Sampling, SchemaFormat


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Args:
        prompt_tokens (int): the longest prompt.
        max_tokens (int): the longest answer.
    """

    prompt_tokens: int
    max_tokens: int


class Service:
    """One model, whatever name a request gives it: no request loads another.

    Args:
        name (str): what the model is called.
        worker: the model's thread.
        metrics: what is counted.
        limits: what a request may ask for.
        defaults (Mapping): of a request's fields that have no default of OpenAI's.
        template_options (Mapping): what the chat template is told, unless a request says otherwise.
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
        self.defaults = defaults
        self._worker = worker
        self.metrics = metrics
        self._limits = limits
        self._template_options = dict(template_options)
        self.tokenizer = worker.tokenizer
        self._always_sampled = [*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids]
        self._vocabulary = constrain.vocabulary_of(self.tokenizer)
        if self.tokenizer.has_tool_calling and not constrain.can_constrain_calls(self.tokenizer):
            logging.warning("this model's tool calls are in a format that is not constrained here: they may not parse")
        self._created = int(time.time())
        self._tokenizing = threading.Lock()  # tokenizers may be changed for a moment while they work

    def start(self, request: Request) -> Answer:
        """Queue a request.

        Raises:
            ApiError: it cannot be answered.
        """
        with self._tokenizing:
            prompt = self._prompt(request)
            constraints = self._constraints(request, prompt)
        self._refuse_excess(request, prompt)
        job = Job(
            prompt,
            request.max_tokens,
            self._sampling(request),
            _penalties(request),
            constraints,
            request.seed,
            _top_logprobs(request),
        )
        try:
            return self._worker.submit(job)
        except QueueFull as error:
            message = f"{error.max_queue} requests are waiting already."
            raise ApiError(429, message, code="rate_limit_exceeded") from error
        except WorkerClosed as error:
            raise ApiError(503, "The server is shutting down.") from error

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return not self._worker.closed

    def model(self) -> dict[str, Any]:
        """What OpenAI's API says about a model."""
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "local"}

    def metrics_text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        return self.metrics.text(self._worker.model.streaming.counters, self._worker.gauges())

    def _prompt(self, request: Request) -> Prompt:
        if not isinstance(request, ChatRequest):
            try:
                return Prompt.from_text(request.prompt, self.tokenizer)
            except ValueError as error:
                raise ApiError(400, f"{error}.", "prompt") from error
        options = self._template_options | thinking_options(request, self.tokenizer)
        tools = request.tools if request.tool_choice != "none" else []
        try:
            return Prompt.from_messages(request.conversation(), self.tokenizer, tools, options)
        except ValueError as error:
            param = "tools" if tools and not self.tokenizer.has_tool_calling else "messages"
            raise ApiError(400, f"{error}.", param) from error

    def _refuse_excess(self, request: Request, prompt: Prompt) -> None:
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        tokens, most = len(prompt.tokens), self._limits.prompt_tokens
        if tokens > most:
            message = f"The prompt has {tokens:,} tokens, and this server takes {most:,}: shorten it."
            raise ApiError(400, message, where, "context_length_exceeded")
        if request.max_tokens > self._limits.max_tokens:
            message = f"max_tokens is {request.max_tokens:,}, and this server generates {self._limits.max_tokens:,}."
            raise ApiError(400, message, "max_tokens")
        if request.logit_bias and not 0 <= min(request.logit_bias) <= max(request.logit_bias) < len(self.tokenizer):
            raise ApiError(400, f"The vocabulary has {len(self.tokenizer)} tokens, from 0 on.", "logit_bias")
        try:
            self._worker.refuse_context(tokens + request.max_tokens)
        except MemoryError as error:
            raise ApiError(400, f"{error}.", where, "context_length_exceeded") from error

    def _constraints(self, request: Request, prompt: Prompt) -> Sequence[constrain.Processor]:
        """What holds tool calls and JSON to their schemas."""
        if not isinstance(request, ChatRequest):
            return []
        wanted = request.response_format
        try:
            if isinstance(wanted, JsonFormat | SchemaFormat):
                schema = wanted.json_schema.schema if isinstance(wanted, SchemaFormat) else {"type": "object"}
                return [constrain.json(self.tokenizer, schema, thinking=prompt.in_thought, vocabulary=self._vocabulary)]
            if request.tools and request.tool_choice != "none":
                choice = request.tool_choice
                if choice == "auto" and not constrain.can_constrain_calls(self.tokenizer):
                    return []  # its log has said so
                choice = choice if isinstance(choice, str) else msgspec.to_builtins(choice)
                return [
                    constrain.constrained(
                        self.tokenizer,
                        tools=request.tools,
                        tool_choice=choice,
                        thinking=prompt.in_thought,
                        vocabulary=self._vocabulary,
                    )
                ]
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return []

    def _sampling(self, request: Sampling) -> dict[str, Any]:
        return {
            "temp": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k if request.top_k < len(self.tokenizer) else 0,
            "min_p": request.min_p,
            "xtc_probability": request.xtc_probability,
            "xtc_threshold": request.xtc_threshold,
            "xtc_special_tokens": self._always_sampled,
        }


def _penalties(request: Sampling) -> dict[str, Any]:
    return {
        "logit_bias": request.logit_bias,
        "repetition_penalty": request.repetition_penalty if request.repetition_penalty != 1 else None,
        "repetition_context_size": request.repetition_context_size,
        "presence_penalty": request.presence_penalty,
        "presence_context_size": request.presence_context_size,
        "frequency_penalty": request.frequency_penalty,
        "frequency_context_size": request.frequency_context_size,
    }


def _top_logprobs(request: Request) -> int:
    return request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs or 0
