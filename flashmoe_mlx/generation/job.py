"""Jobs for the worker, and their answers, token by token."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from flashmoe_mlx.constrain import Processor
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.generation.prompt_logprobs import PromptToken


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Args:
        text (str): The text that it completes; empty while a character is incomplete.
        id (int): Its index in the vocabulary.
        logprob (float): Natural logarithm of its probability.
        top_logprobs (tuple[tuple[int, float], ...]): Id and logprob of the most likely tokens, as many as the job asks
            for.
        finish_reason (str, optional): Set on the last token: ``"stop"`` or ``"length"``.
    """

    text: str
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Job:
    """A prompt to answer, and how to sample the answer.

    Args:
        prompt (Prompt): The prompt, at least one token.
        max_tokens (int): Length limit of the answer, in tokens. With 0, the prompt is computed and nothing generated.
        sampling (dict): Arguments of mlx-lm's ``make_sampler``.
        penalties (dict): Arguments of mlx-lm's ``make_logits_processors``.
        constraints (Sequence): Further logits processors, e.g. from :mod:`flashmoe_mlx.constrain`.
        seed (int, optional): Seed of the sampling. Default: ``None``, a random one.
        top_logprobs (int): How many of the most likely tokens to report with each token.
        prompt_logprobs (bool): Compute the logprobs of the prompt's tokens, too.
    """

    prompt: Prompt
    max_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, Any] = field(default_factory=dict)
    constraints: Sequence[Processor] = ()
    seed: int | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False


class Answer:
    """The answer to a job: a queue of tokens between the worker's thread and the one that reads them.

    Args:
        job (Job): The job.

    Attributes:
        job (Job): The job.
        cached_tokens (int): Length of the part of the prompt whose state was cached; set before the first token.
        prompt_logprobs (list[PromptToken]): The prompt's tokens if the job asks for their logprobs; set before the
            first token.
        submitted (float): ``time.perf_counter()`` when the job was submitted.
        cancelled (bool): Nobody reads this answer any more.
    """

    def __init__(self, job: Job):
        self.job = job
        self.cached_tokens = 0
        self.prompt_logprobs: list[PromptToken] = []
        self.submitted = time.perf_counter()
        self.cancelled = False
        self._events: SimpleQueue[Token | Exception | None] = SimpleQueue()

    def cancel(self) -> None:
        """End the answer at its next token, or at the next prefill chunk."""
        self.cancelled = True

    def tokens(self, tick: float) -> Iterator[Token | None]:
        """Yield the tokens as they are generated, and ``None`` after each ``tick`` seconds without one.

        Raises:
            WorkerClosed: The worker was closed before the answer was complete.
            Exception: Any error of the model's thread.
        """
        while True:
            try:
                event = self._events.get(timeout=tick)
            except Empty:
                yield None
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def put(self, event: Token | Exception | None) -> None:
        """Add a token, an error, or ``None`` for the end."""
        self._events.put(event)
