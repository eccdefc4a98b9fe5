"""Prompts: messages or text, as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from mlx_lm.tokenizer_utils import TokenizerWrapper

# Tokens: a shorter prefix is cheap to prefill again together with what follows it.
_MIN_PREFIX = 512
# Tokens: how long a template's start of an answer may be.
_TAIL = 16


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        tokens (list[int]): All of it.
        in_thought (bool): The answer begins inside a thought, which the template has opened.
        prefix_lengths (tuple[int, ...]): Lengths of the prefixes that other prompts may share: the system message with
            the tools, and all but the start of the answer, which a template may drop once there is an answer.
        preamble (int): Length of the prefix with system message and tools; 0 if it is short.
    """

    tokens: list[int]
    in_thought: bool = False
    prefix_lengths: tuple[int, ...] = ()
    preamble: int = 0

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: TokenizerWrapper,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Render a conversation with the model's chat template.

        Args:
            messages (Sequence[dict]): The conversation, as chat templates take it.
            tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
            tools (Sequence[dict]): Functions that the model may call, in OpenAI's form.
            template_options (dict, optional): Variables of the template, e.g. ``{"enable_thinking": False}``.

        Raises:
            ValueError: The model has no chat template or no tool calls, or its template rejects the messages.
        """
        if not tokenizer.has_chat_template:
            raise ValueError("this model has no chat template: it can only continue a text")
        if tools and not tokenizer.has_tool_calling:
            raise ValueError("mlx-lm has no parser for this model's tool calls: leave out the tools")

        def render(messages: Sequence[Mapping[str, Any]], start: bool) -> list[int]:
            try:
                tokens: list[int] = tokenizer.apply_chat_template(
                    list(messages), tools=list(tools) or None, add_generation_prompt=start, **(template_options or {})
                )
            # Templates raise errors of many types, most of them their own.
            except Exception as error:
                raise ValueError(f"the chat template rejects these messages: {error}") from error
            return tokens

        tokens = render(messages, True)
        start, end = -1, -1
        if tokenizer.has_thinking:
            start, end = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
        preamble = 0
        system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        if len(tokens) > _MIN_PREFIX and (tools or system):
            other = render([*messages[:system], {"role": "user", "content": ""}], False)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(other, tokens, strict=False))
            preamble = sum(1 for _ in same)
        lengths = {preamble, start} if start >= len(tokens) - _TAIL else {preamble}
        lengths = {length for length in lengths if length >= _MIN_PREFIX}
        return cls(tokens, start > end, tuple(sorted(lengths)), preamble if preamble in lengths else 0)

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
