"""A conversation with a model, whose state is kept from one answer to the next."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, stream_generate, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.constrain import Processor, constrained, readable, vocabulary_of
from flashmoe_mlx.generation.output_parser import Delta, OutputParser

Message = dict[str, Any]


class Conversation:
    """Messages, and prompt caches of the tokens that the model has seen of them.

    There are two, because linear attention has no way back: one after the last answer, and one before it, as many
    templates leave out of an answer what was thought once there is another question.

    Args:
        model (nn.Module): from :func:`flashmoe_mlx.load`.
        tokenizer (TokenizerWrapper): the model's.
        messages (Sequence[dict]): how it begins, e.g. with a system message.
        tools (Sequence[dict]): what the model may call, in OpenAI's form.
        template_options (dict): what the chat template is told, e.g. ``{"enable_thinking": False}``.
        max_kv_size (int, optional): of a cache that forgets the middle. Default: ``None``, it keeps everything.

    Attributes:
        messages (list[dict]): the conversation so far, as chat templates take it.
        last (GenerationResponse, optional): mlx-lm's figures of the last answer; the prompt is what had to be read.
        holds_calls (bool): calls are held to their schemas; the form of calls of some models is not known.

    Raises:
        ValueError: the model has no chat template, or mlx-lm knows no tool calls of it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        messages: Sequence[Message] = (),
        tools: Sequence[dict[str, Any]] = (),
        template_options: dict[str, Any] | None = None,
        max_kv_size: int | None = None,
    ):
        if not tokenizer.has_chat_template:
            raise ValueError("this model has no chat template: it can go on with a text, see flashmoe_mlx.generate")
        if tools and not tokenizer.has_tool_calling:
            raise ValueError("mlx-lm knows no tool calls of this model: leave out the tools")
        self.messages = list(messages)
        self.last: GenerationResponse | None = None
        self._model, self._tokenizer, self._tools = model, tokenizer, list(tools)
        self._template_options = template_options or {}
        self._max_kv_size = max_kv_size
        self._states: list[tuple[list[int], list[Any]]] = []  # tokens, and the cache that has seen them
        self._vocabulary = vocabulary_of(tokenizer) if tools else None
        self.holds_calls = True
        try:
            self._constraints()
        except ValueError:
            self.holds_calls = False

    def answer(self, max_tokens: int, stopped: Callable[[], bool] = lambda: False, **options: Any) -> Iterator[Delta]:
        """Let the model answer; at the end its message is added to the others.

        If this is interrupted in another way than by ``stopped``, no message is added.

        Args:
            max_tokens (int): the longest answer.
            stopped (Callable): asked after each token whether it shall be the last one.
            options: for mlx-lm's ``stream_generate``, e.g. ``sampler``.

        Yields:
            Delta: what some tokens add to the answer.

        Raises:
            ValueError: the chat template does not take these messages.
            MemoryError: the conversation does not fit into memory any more.
        """
        tokens = self._render()
        context = len(tokens) + max_tokens
        self._model.streaming.refuse_context(min(context, self._max_kv_size or context))
        began = time.perf_counter()
        seen, cache = self._nearest(tokens)
        before = self._render(start=False)
        if len(seen) <= len(before) < len(tokens) and tokens[: len(before)] == before:
            self._read(before[len(seen) :], cache, options)
            self._states.append((before, copy.deepcopy(cache)))
            rest = tokens[len(before) :]
        else:
            rest = tokens[len(seen) :]
        read, seconds = len(tokens) - len(seen), 0.0
        parser = OutputParser(self._tokenizer, in_thought=self._begins_in_thought(tokens), tools=readable(self._tools))
        whole = Delta()
        for response in stream_generate(
            self._model,
            self._tokenizer,
            rest,
            max_tokens=max_tokens,
            prompt_cache=cache,
            logits_processors=self._constraints(),
            **options,
        ):
            tokens.append(response.token)  # which the cache has seen by now, as mlx-lm is one token ahead
            seconds = seconds or time.perf_counter() - began
            self.last = replace(response, prompt_tokens=read, prompt_tps=read / seconds)
            last = response.finish_reason is not None or stopped()
            delta = parser.feed(response.text, last)
            whole += delta
            yield delta
            if last:
                break
        self._states.append((tokens, cache))
        self.messages.append(_message(whole))

    def _nearest(self, tokens: list[int]) -> tuple[list[int], list[Any]]:
        """The state from which the fewest tokens are left. All are forgotten, as it is about to change."""
        states, self._states = self._states, []
        fitting = [(seen, cache) for seen, cache in states if len(seen) < len(tokens) and tokens[: len(seen)] == seen]
        return max(fitting, key=lambda state: len(state[0]), default=None) or (
            [],
            make_prompt_cache(self._model, self._max_kv_size),
        )

    def _read(self, tokens: list[int], cache: list[Any], options: dict[str, Any]) -> None:
        if tokens:
            known = ("prefill_step_size", "prompt_progress_callback")
            options = {name: options[name] for name in known if name in options}
            with wired_limit(self._model, [generation_stream]):
                for _ in generate_step(mx.array(tokens), self._model, max_tokens=0, prompt_cache=cache, **options):
                    pass

    def _render(self, start: bool = True) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer.apply_chat_template(
                self.messages, tools=self._tools or None, add_generation_prompt=start, **self._template_options
            )
        except Exception as error:  # templates refuse in many ways, most of them by an error of their own
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return tokens

    def _begins_in_thought(self, tokens: list[int]) -> bool:
        if not self._tokenizer.has_thinking:
            return False
        return bool(self._tokenizer.rfind_think_start(tokens) > self._tokenizer.rfind_think_end(tokens))

    def _constraints(self) -> list[Processor]:
        if not self._tools or not self.holds_calls:
            return []
        return [constrained(self._tokenizer, tools=self._tools, vocabulary=self._vocabulary)]


def _message(whole: Delta) -> Message:
    message: Message = {"role": "assistant", "content": whole.content}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning  # templates keep it while the model works on a question
    if whole.tool_calls:  # templates want arguments as a mapping, OpenAI's clients as text
        functions = [call["function"] for call in whole.tool_calls]
        message["tool_calls"] = [
            call | {"function": function | {"arguments": json.loads(function["arguments"])}}
            for call, function in zip(whole.tool_calls, functions, strict=True)
        ]
    return message
