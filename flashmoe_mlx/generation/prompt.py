"""Prompts: messages or text, as tokens."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from typing import Any, Self

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.generation.fitted_messages import Message, fit_messages

NEW_ANSWER = "the last message is the assistant's, and a new answer begins: set continue_final_message to continue it"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Args:
        tokens (list[int]): All of it.
        in_thought (bool): The answer begins inside a thought, which the template or a continued message has opened.
        preamble (int): Length of the prefix with system message and tools, which other conversations may share; 0 if
            there are none.
        answer_start (int): Length of the prefix that the next prompt of the conversation shares: up to the marker with
            which the template starts a thought, open or empty, because most templates drop it later, or else all but
            the last token. 0 if there is no conversation.
        notes (tuple[str, ...]): What was changed in the messages so that the template takes them, for people.
    """

    tokens: list[int]
    in_thought: bool = False
    preamble: int = 0
    answer_start: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Message],
        tokenizer: TokenizerWrapper,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
    ) -> Self:
        """Render a conversation with the model's chat template, after :func:`fit_messages`.

        A last message of the assistant is complete unless ``continue_final_message`` is true, as in mlx-lm and
        transformers: a new answer follows it, and a note says so. Notes are logged, each once.

        Args:
            messages (Sequence[dict]): The conversation.
            tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model.
            tools (Sequence[dict]): Functions that the model may call, in OpenAI's form.
            template_options (dict, optional): Variables of the template, e.g. ``{"enable_thinking": False}``.
            continue_final_message (bool): The answer continues the text of the last message, which is the assistant's.
                If that is empty, it is left out. Default: ``False``.

        Raises:
            ValueError: The model has no chat template or no tool calls, its template rejects or drops messages, or the
                last message cannot be continued.
        """
        check_chat(tokenizer, tools)
        if not messages:
            raise ValueError("there are no messages")
        if continue_final_message:
            messages, continue_final_message = _continued(messages)
        render = partial(
            tokenizer.apply_chat_template,
            tools=list(tools) or None,
            add_generation_prompt=False,
            **(template_options or {}),
        )
        whole = partial(
            render,
            add_generation_prompt=not continue_final_message,
            # transformers refuses both at once.
            **({"continue_final_message": True} if continue_final_message else {}),
        )
        # Templates raise errors of many types, most of them their own.
        try:
            messages, notes = fit_messages(messages, lambda each: whole(list(each), tokenize=False))
            text, tokens = whole(messages, tokenize=False), whole(messages)
        except Exception as error:
            raise ValueError(f"the chat template rejects these messages: {error}") from error
        if not tokens:
            raise ValueError("the chat template makes an empty prompt of these messages")
        if messages[-1]["role"] == "assistant" and not continue_final_message:
            notes.append(NEW_ANSWER)
        for note in notes:
            _log_once(note)
        system = list(takewhile(lambda message: message["role"] == "system", messages))
        preamble = 0
        if tools or system:
            # A template may reject a conversation that has only begun; then nothing is known to be shared.
            with suppress(Exception):
                preamble = _common_length(tokens, render([*system, {"role": "user", "content": ""}]))
        question = ""
        with suppress(Exception):
            question = render(messages[:-1] if continue_final_message else messages, tokenize=False)
        # A marker in the text of a question opens no thought.
        answer = text[_common_length(text, question) :]
        in_thought, answer_start = False, len(tokens) - 1
        if tokenizer.has_thinking and tokenizer.think_start in answer:
            in_thought = answer.rfind(tokenizer.think_start) > answer.rfind(tokenizer.think_end)
            answer_start = max(0, tokenizer.rfind_think_start(tokens)) or answer_start
        return cls(tokens, in_thought, preamble, answer_start, tuple(notes))

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


def _continued(messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
    """Return the messages to render, and whether the last one has a text to continue.

    Raises:
        ValueError: It is not a text of the assistant's.
    """
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise ValueError("only a text of the assistant can be continued, and the last message is not one")
    return (messages, True) if last["content"] else (messages[:-1], False)


@cache
def _log_once(note: str) -> None:
    """Log a note, unless it was logged before in this process."""
    logging.warning(note)


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
