"""Prompts: messages or text, as tokens."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]
"""A message as chat templates take it: ``role``, ``content``, and e.g. ``tool_calls``."""

# Tokens: the longest start of an answer that a template may write.
_MAX_ANSWER_START = 16


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        tokens (list[int]): All of it.
        in_thought (bool): The answer begins inside a thought, which the template has opened.
        preamble (int): Length of the prefix with system message and tools, which other conversations may share; 0 if
            there are none.
        thought_start (int): Length of the prefix before the marker with which the template starts a thought, open or
            empty; 0 if there is none. Later prompts share that prefix, but most templates drop the thought from them.
    """

    tokens: list[int]
    in_thought: bool = False
    preamble: int = 0
    thought_start: int = 0

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Message],
        tokenizer: TokenizerWrapper,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Render a conversation with the model's chat template.

        Args:
            messages (Sequence[dict]): The conversation.
            tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
            tools (Sequence[dict]): Functions that the model may call, in OpenAI's form.
            template_options (dict, optional): Variables of the template, e.g. ``{"enable_thinking": False}``.

        Raises:
            ValueError: The model has no chat template or no tool calls, or its template rejects the messages.
        """
        check_chat(tokenizer, tools)

        def render(messages: Sequence[Message], start_answer: bool) -> list[int]:
            rendered: list[int] = tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=start_answer,
                **(template_options or {}),
            )
            return rendered

        # Templates raise errors of many types, most of them their own.
        try:
            tokens = render(messages, True)
        except Exception as error:
            raise ValueError(f"the chat template rejects these messages: {error}") from error
        if not tokens:
            raise ValueError("the chat template makes an empty prompt of these messages")
        system = list(takewhile(lambda message: message["role"] == "system", messages))
        preamble = 0
        if tools or system:
            # A template may reject a conversation that has only begun; then nothing is known to be shared.
            with suppress(Exception):
                preamble = _common_length(tokens, render([*system, {"role": "user", "content": ""}], False))
        opened, closed = -1, -1
        if tokenizer.has_thinking:
            opened, closed = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
        starts_answer = opened >= max(0, len(tokens) - _MAX_ANSWER_START)
        return cls(tokens, opened > closed, preamble, opened if starts_answer else 0)

    @classmethod
    def from_text(cls, text: str | Sequence[int], tokenizer: TokenizerWrapper) -> Self:
        """Encode a text, or check tokens.

        Args:
            text (str or Sequence[int]): The text, or its tokens.
            tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.

        Raises:
            ValueError: It is empty, or a token is not in the vocabulary.
        """
        tokens = list(tokenizer.encode(text, verbose=False) if isinstance(text, str) else text)
        if not tokens:
            raise ValueError("the prompt is empty")
        if max(tokens) >= len(tokenizer):
            raise ValueError(f"{max(tokens)} is not a token: the vocabulary has {len(tokenizer)}")
        return cls(tokens)


def check_chat(tokenizer: TokenizerWrapper, tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that a model can chat, and call tools if there are some.

    Raises:
        ValueError: It cannot.
    """
    if not tokenizer.has_chat_template:
        raise ValueError("this model has no chat template: it can only continue a text")
    if tools and not tokenizer.has_tool_calling:
        raise ValueError("mlx-lm has no parser for this model's tool calls: leave out the tools")


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
