"""Prefill and decoding: from a prompt's tokens to those of its answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    GenerationResponse,
    generation_stream,
    maybe_quantize_kv_cache,
    stream_generate,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Processor
from flashmoe_mlx.generation.kv_cache import make_kv_cache, plan_prefill, refuse_context
from flashmoe_mlx.generation.prefix_cache import Kind, PrefixCache
from flashmoe_mlx.generation.prompt_logprobs import scored_chunk

Sampler = Callable[[mx.array], mx.array]


@dataclass
class Context:
    """Tokens, and the state of the model after them.

    Args:
        tokens (list[int]): The prompt, and the answer as far as it is decoded.
        cache (list): The model's cache, one item per layer. It has seen all tokens, except the last one of a prompt,
            which decoding begins with.
        cached_tokens (int): How many tokens of the prompt were not computed, because their state was cached.
    """

    tokens: list[int]
    cache: list[Any]
    cached_tokens: int


class Generator:
    """Prefills prompts from the longest cached prefix on, and decodes answers.

    Args:
        model (nn.Module): From :func:`flashmoe_mlx.load`.
        tokenizer (TokenizerWrapper): The model's.
        prefixes (PrefixCache): States to continue from. Those of prefills and answers are added.
        prefill_step_size (int, optional): Tokens in a prefill chunk. Default: as many as memory allows, which are fewer
            as the context grows.
        kv_cache (dict, optional): mlx-lm's ``kv_bits``, ``kv_group_size`` and ``quantized_kv_start``. Default: the KV
            cache is not quantized.
        max_kv_size (int, optional): Tokens that layers of full attention keep, see :func:`make_kv_cache`. Default: all.

    Attributes:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): The tokenizer.
        prefixes (PrefixCache): States to continue from.

    Raises:
        ValueError: The model's KV cache cannot be limited to ``max_kv_size``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        prefixes: PrefixCache,
        prefill_step_size: int | None = None,
        kv_cache: Mapping[str, Any] | None = None,
        max_kv_size: int | None = None,
    ):
        self.model, self.tokenizer, self.prefixes = model, tokenizer, prefixes
        self._step_size = prefill_step_size
        self._kv_cache = kv_cache or {"kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 0}
        self._max_kv_size = max_kv_size
        # Refused now rather than in the first answer.
        make_kv_cache(model, max_kv_size)

    def refuse_context(self, tokens: int) -> None:
        """Refuse a context whose KV cache would not fit in memory.

        Args:
            tokens (int): Length of prompt and answer together.

        Raises:
            MemoryError: It does not fit.
        """
        step_size = self._step_size or self.model.streaming.prefill_step_size
        refuse_context(self.model, tokens, step_size, max_kv_size=self._max_kv_size, **self._kv_cache)

    def prefill(
        self,
        tokens: Sequence[int],
        keep: Mapping[int, Kind],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda processed, total: None,
        take_logits: Callable[[mx.array], None] | None = None,
    ) -> Context:
        """Run all tokens of a prompt but the last one through the model, in chunks.

        Args:
            tokens (Sequence[int]): The prompt, at least one token.
            keep (Mapping[int, str]): Lengths of prefixes that later prompts may share, and their kinds. Their states
                are added to the prefix cache unless it can do without.
            cancelled (Callable, optional): Asked before each chunk; if true, the context stays incomplete.
            progress (Callable, optional): Called with the numbers of tokens processed so far and in total.
            take_logits (Callable, optional): Called with the logits of each chunk, ``[1, length, vocabulary]``. Then
                all tokens are computed, in smaller chunks. Default: logits are not computed.

        Returns:
            Context: The prompt and the state of the model.
        """
        end = len(tokens) - 1
        # A cached state has no logits.
        cache, cached = (None, 0) if take_logits else self.prefixes.nearest(tokens[:end])
        cache = cache or make_kv_cache(self.model, self._max_kv_size)
        most = scored_chunk(len(self.tokenizer)) if take_logits else len(tokens)
        keep = {length: kind for length, kind in keep.items() if self.prefixes.needs_prefix(cache, kind)}
        settings = {"cached": cached, "max_kv_size": self._max_kv_size, **self._kv_cache}
        plan = plan_prefill(self.model, len(tokens), self._step_size, **settings)
        position = cached
        # As mlx-lm does it, on the stream that it decodes on.
        with mx.stream(generation_stream):
            while position < end and not cancelled():
                progress(position - cached, end - cached)
                # Chunks end where prompts may diverge.
                chunk_end = position + min(plan.chunk(position), most)
                stop = min([chunk_end, end, *(length for length in keep if length > position)])
                logits = self.model(mx.array(list(tokens[position:stop]))[None], cache=cache)
                if take_logits is not None:
                    take_logits(logits)
                maybe_quantize_kv_cache(cache, **self._kv_cache)
                mx.eval([layer.state for layer in cache])
                mx.clear_cache()
                position = stop
                if position in keep:
                    self.prefixes.keep_prefix(tokens[:position], cache, keep[position])
        if cached < position:
            progress(position - cached, position - cached)
        return Context(list(tokens), cache, cached)

    def decode(
        self,
        context: Context,
        max_tokens: int,
        *,
        sampler: Sampler | None = None,
        logits_processors: Sequence[Processor] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[GenerationResponse]:
        """Decode an answer, and add the state after it to the prefix cache.

        Args:
            context (Context): From :meth:`prefill`. It grows with the answer.
            max_tokens (int): Length limit of the answer.
            sampler (Callable, optional): Chooses a token by log-probabilities. Default: the most likely one.
            logits_processors (Sequence): Applied to the logits of each token. They see the last token of the prompt and
                those of the answer.
            stopped (Callable, optional): Asked after each token; if true, the answer ends with it.

        Yields:
            GenerationResponse: mlx-lm's response for each token. ``finish_reason`` is set on the last one.
        """
        for response in stream_generate(
            self.model,
            self.tokenizer,
            context.tokens[-1:],
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=list(logits_processors),
            prompt_cache=context.cache,
            **self._kv_cache,
        ):
            context.tokens.append(response.token)
            if response.finish_reason is None and stopped():
                response = replace(response, finish_reason="stop")
            yield response
            if response.finish_reason is not None:
                break
        # The cache has seen the last token, too: mlx-lm computes one ahead.
        self.prefixes.keep(context.tokens, context.cache)
