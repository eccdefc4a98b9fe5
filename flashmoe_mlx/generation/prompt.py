"""A request's prompt, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.schema import ChatRequest, CompletionRequest

_CHUNK = 512  # tokens: a shorter beginning costs little to read again together with what follows it
_TAIL = 16  # tokens: how long a template's start of an answer may be


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Args:
        tokens (list[int]): all of it.
        thinks (bool): the answer begins inside a thought.
        beginnings (tuple[int, ...]): lengths of the parts that other prompts may begin with: system message and tools,
            and all but the start of the answer, which a template may leave out once there is an answer.
        preamble (int): length of the part with system message and tools, 0 if it is short.
    """

    tokens: list[int]
    thinks: bool = False
    beginnings: tuple[int, ...] = ()
    preamble: int = 0

    @classmethod
    def of_chat(cls, request: ChatRequest, tokenizer: TokenizerWrapper, options: dict[str, Any]) -> Self:
        """Render a conversation with the model's chat template.

        Args:
            request: the conversation.
            tokenizer: mlx-lm's.
            options: for the template.

        Raises:
            ApiError: the model has no template, or it does not take this conversation.
        """
        if not tokenizer.has_chat_template:
            raise ApiError(400, "This model has no chat template: use /v1/completions.")
        options = {**options, **_thinking(request, tokenizer)}
        tools = request.tools if request.tool_choice != "none" else []
        if tools and not tokenizer.has_tool_calling:
            raise ApiError(400, "mlx-lm knows no tool calls of this model.", "tools")
        messages = request.conversation()

        def render(messages: Sequence[dict[str, Any]], start: bool) -> list[int]:
            try:
                tokens: list[int] = tokenizer.apply_chat_template(
                    list(messages), tools=tools or None, add_generation_prompt=start, **options
                )
            except Exception as error:  # templates refuse in many ways, most of them by an error of their own
                raise ApiError(400, f"The chat template does not take these messages: {error}", "messages") from error
            return tokens

        tokens = render(messages, True)
        start, end = -1, -1
        if tokenizer.has_thinking:
            start, end = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
        preamble = 0
        system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        if len(tokens) > _CHUNK and (tools or system):
            other = render([*messages[:system], {"role": "user", "content": ""}], False)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(other, tokens, strict=False))
            preamble = sum(1 for _ in same)
        beginnings = {preamble, start} if start >= len(tokens) - _TAIL else {preamble}
        beginnings = {length for length in beginnings if length >= _CHUNK}
        return cls(tokens, start > end, tuple(sorted(beginnings)), preamble if preamble in beginnings else 0)

    @classmethod
    def of_completion(cls, request: CompletionRequest, tokenizer: TokenizerWrapper) -> Self:
        """Encode a text, or take the tokens as they are.

        Raises:
            ApiError: it is empty, or a token is not of the vocabulary.
        """
        prompt = request.prompt
        tokens = tokenizer.encode(prompt, verbose=False) if isinstance(prompt, str) else prompt
        if not tokens:
            raise ApiError(400, "The prompt is empty.", "prompt")
        if max(tokens) >= len(tokenizer):
            raise ApiError(400, f"{max(tokens)} is no token: the vocabulary has {len(tokenizer)}.", "prompt")
        return cls(tokens)


def _thinking(request: ChatRequest, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """What the template is told about thinking.

    Raises:
        ApiError: something that the model or its template does not know.
    """
    options: dict[str, Any] = {}
    wanted = request.chat_template_kwargs.enable_thinking
    if request.reasoning_effort == "none":
        if wanted:
            raise ApiError(400, "enable_thinking and reasoning_effort contradict each other.", "reasoning_effort")
        wanted = False
    elif request.reasoning_effort is not None:
        if "reasoning_effort" not in str(tokenizer.chat_template):
            raise ApiError(
                400, 'This model can think or, with "none", not think: it knows no degrees.', "reasoning_effort"
            )
        options["reasoning_effort"] = request.reasoning_effort
    if wanted and not tokenizer.has_thinking:
        raise ApiError(400, "This model does not think.", "chat_template_kwargs.enable_thinking")
    if wanted is not None:
        options["enable_thinking"] = wanted
    return options
