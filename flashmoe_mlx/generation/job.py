"""Requests to generate, and the tokens they yield."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from flashmoe_mlx.constrain import Processor


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Args:
        text (str): that it brings; some bring none, as they are a part of a character.
        token (int): its number.
        logprob (float): natural logarithm of its probability.
        top (tuple[tuple[int, float], ...]): the likeliest tokens and their logprobs, as many as were asked for.
        finish_reason (str, optional): of the last one, ``"stop"`` or ``"length"``.
    """

    text: str
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Order:
    """What to generate.

    Args:
        prompt (Sequence[int]): tokens, at least one.
        max_tokens (int): the longest answer.
        beginnings (Sequence[int]): lengths of the parts of the prompt that other prompts may begin with.
        sampling (dict): for mlx-lm's ``make_sampler``.
        penalties (dict): for mlx-lm's ``make_logits_processors``.
        constraints (Sequence): logits processors besides.
        seed (int, optional): of the sampling. Default: ``None``, another one each time.
        top_logprobs (int): how many of the likeliest tokens to tell.
        preamble (int): length of the part of the prompt that is worth keeping on disk, if there is one.
    """

    prompt: Sequence[int]
    max_tokens: int
    beginnings: Sequence[int] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, Any] = field(default_factory=dict)
    constraints: Sequence[Processor] = ()
    seed: int | None = None
    top_logprobs: int = 0
    preamble: int = 0


class Generation:
    """An answer on its way.

    Attributes:
        order (Order): what was asked for.
        cached_tokens (int): of the prompt, whose state was there; known from the first token on.
    """

    def __init__(self, order: Order):
        self.order = order
        self.cached_tokens = 0
        self.began = time.perf_counter()
        self._events: SimpleQueue[Token | Exception | None] = SimpleQueue()
        self.cancelled = False

    def cancel(self) -> None:
        """Let it end at the next token, or at the next chunk of the prompt."""
        self.cancelled = True

    def tokens(self, tick: float) -> Iterator[Token | None]:
        """Its tokens as they come; ``None`` when ``tick`` seconds have brought none.

        Raises:
            Exception: what went wrong on the model's thread.
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
