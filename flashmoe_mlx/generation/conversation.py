"""A conversation with a model, which computes only what is new in each turn."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_lm.generate import GenerationResponse

from flashmoe_mlx.constrain import Processor, constrained, vocabulary_of
from flashmoe_mlx.generation.fitted_messages import Message, with_arguments
from flashmoe_mlx.generation.generator import Generator, Sampler
from flashmoe_mlx.generation.output_parser import Delta, OutputParser
from flashmoe_mlx.generation.prompt import Prompt, check_chat


class Conversation:
    """Messages, and answers of a model to them.

    Args:
        generator (Generator): Generates the answers. Its prefix cache should have room for two states: one after the
            last answer, and one before it, because many templates drop the thoughts of an answer once there is another
            question.
        messages (Sequence[dict]): The first messages, e.g. a system message.
        tools (Sequence[dict]): Functions that the model may call, in OpenAI's form.
        template_options (dict, optional): Variables of the chat template, e.g. ``{"enable_thinking": False}``.

    Attributes:
        messages (list[dict]): The conversation so far, as chat templates take it.
        last_response (GenerationResponse, optional): mlx-lm's statistics of the last answer. Its prompt is the part
            that was not cached.
        constrains_calls (bool): Calls are constrained to their schemas. They are not if the model's format of calls or
            a schema is not supported.

    Raises:
        ValueError: The model has no chat template, or there are tools and mlx-lm has no parser for its calls.
    """

    def __init__(
        self,
        generator: Generator,
        messages: Sequence[Message] = (),
        tools: Sequence[dict[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
    ):
        self._generator, self._tokenizer = generator, generator.tokenizer
        self.messages = list(messages)
        self.last_response: GenerationResponse | None = None
        self._tools, self._template_options = list(tools), template_options
        check_chat(self._tokenizer, self._tools)
        self._vocabulary = vocabulary_of(self._tokenizer) if tools else None
        self.constrains_calls = True
        try:
            self._constraints()
        except ValueError:
            self.constrains_calls = False

    def answer(
        self,
        max_tokens: int,
        *,
        sampler: Sampler | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda processed, total: None,
    ) -> Iterator[Delta]:
        """Generate an answer, and add its message to the others at the end.

        No message is added if the caller or an exception ends this in another way than by ``stopped``.

        Args:
            max_tokens (int): Length limit of the answer.
            sampler (Callable, optional): Chooses a token by log-probabilities. Default: the most likely one.
            stopped (Callable, optional): Asked after each token; if true, the answer ends with it.
            progress (Callable, optional): Called during prefill with the numbers of tokens processed and in total.

        Yields:
            Delta: What a token adds to the answer.

        Raises:
            ValueError: The chat template rejects these messages.
            MemoryError: The conversation does not fit in memory any more.
        """
        prompt = Prompt.from_messages(self.messages, self._tokenizer, self._tools, self._template_options)
        self._generator.refuse_context(len(prompt.tokens) + max_tokens)
        began = time.perf_counter()
        context = self._generator.prefill(prompt.tokens, {prompt.answer_start: "user"}, progress=progress)
        computed, seconds = len(prompt.tokens) - context.cached_tokens, 0.0
        parser = OutputParser(self._tokenizer, in_thought=prompt.in_thought, tools=self._tools)
        whole = Delta()
        for response in self._generator.decode(
            context, max_tokens, sampler=sampler, logits_processors=self._constraints(), stopped=stopped
        ):
            seconds = seconds or time.perf_counter() - began
            self.last_response = replace(response, prompt_tokens=computed, prompt_tps=computed / seconds)
            delta = parser.feed(response.text, response.finish_reason is not None)
            whole += delta
            yield delta
        self.messages.append(_message(whole))

    def _constraints(self) -> list[Processor]:
        if not self._tools or not self.constrains_calls:
            return []
        return [constrained(self._tokenizer, tools=self._tools, vocabulary=self._vocabulary)]


def _message(whole: Delta) -> Message:
    message: Message = {"role": "assistant", "content": whole.content}
    # Templates keep the thoughts while the model works on a question.
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    # Templates take the arguments as a mapping; OpenAI's form has them as text.
    if whole.tool_calls:
        message["tool_calls"] = whole.tool_calls
    return with_arguments(message, json.loads)
