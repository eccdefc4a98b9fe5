"""Read OpenAI's requests and turn them into jobs for the worker."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx import constrain
from flashmoe_mlx.generation.job import Job
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.generation.sampling import xtc_special_tokens
from flashmoe_mlx.serving.errors import ApiError, bad_request
from flashmoe_mlx.serving.openai.schema import (
    ChatRequest,
    JsonFormat,
    NamedSchema,
    NamedTool,
    Request,
    Sampling,
    SchemaFormat,
    TextFormat,
    Tool,
)

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Request)


def read_request(kind: type[_Request], body: bytes, defaults: Mapping[str, Any]) -> _Request:
    """Parse and validate the body of a request.

    Args:
        kind (type): ``ChatRequest`` or ``CompletionRequest``.
        body (bytes): JSON in UTF-8.
        defaults (Mapping): Values of fields that the body leaves out or sets to null.

    Raises:
        ApiError: The body is not JSON, or a field is wrong, missing or unknown.
    """
    try:
        fields = msgspec.json.decode(body)
    # msgspec's own errors are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    fields = _without_nulls(fields)
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    if "max_completion_tokens" in fields:
        fields.setdefault("max_tokens", fields["max_completion_tokens"])
    request = _convert({**defaults, **fields}, kind)
    if isinstance(request, ChatRequest):
        _check_consistency(request, _convert(request.tools, list[Tool], "tools"))
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options requires stream: true.", "stream_options")
    return request


def make_jobs(
    request: Request, tokenizer: TokenizerWrapper, vocabulary: Any, template_options: Mapping[str, Any]
) -> list[Job]:
    """Return the jobs that answer a request, one for each prompt. Their ``max_tokens`` is -1 where it is not limited.

    Args:
        request (Request): The request.
        tokenizer (TokenizerWrapper): mlx-lm's tokenizer of the model. Only one thread at a time may use it here.
        vocabulary (Any): The result of :func:`flashmoe_mlx.constrain.vocabulary_of`.
        template_options (Mapping): Variables of the chat template, unless the request sets them.

    Raises:
        ApiError: The model does not support what the request asks for.
    """
    prompts: list[Prompt] = []
    constraints: Sequence[constrain.Processor] = ()
    prompt_logprobs = False
    if isinstance(request, ChatRequest):
        prompts = [_chat_prompt(request, tokenizer, template_options)]
        constraints = _constraints(request, prompts[0], tokenizer, vocabulary)
        top_logprobs = request.top_logprobs
    else:
        top_logprobs = request.logprobs or 0
        prompt_logprobs = request.echo and request.logprobs is not None
        for text in request.prompts():
            with bad_request("prompt"):
                prompts.append(Prompt.from_text(text, tokenizer))
    return [
        Job(
            prompt,
            -1 if request.max_tokens is None else request.max_tokens,
            sampling=_sampling(request, tokenizer),
            penalties=_penalties(request),
            constraints=constraints,
            seed=request.seed,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for prompt in prompts
    ]


def thinking_options(request: ChatRequest, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return the variables of the chat template that turn thinking on or off, as far as the request says so.

    Raises:
        ApiError: The model or its template does not support what the request asks for.
    """
    options: dict[str, Any] = {}
    wanted = request.chat_template_kwargs.enable_thinking
    if request.reasoning_effort == "none":
        if wanted:
            raise ApiError(400, "enable_thinking and reasoning_effort contradict each other.", "reasoning_effort")
        wanted = False
    elif request.reasoning_effort is not None:
        if "reasoning_effort" not in str(tokenizer.chat_template):
            message = 'This model has no reasoning levels: use reasoning_effort "none" or leave it out.'
            raise ApiError(400, message, "reasoning_effort")
        options["reasoning_effort"] = request.reasoning_effort
    if wanted and not tokenizer.has_thinking:
        raise ApiError(400, "This model does not support thinking.", "chat_template_kwargs.enable_thinking")
    if wanted is not None:
        options["enable_thinking"] = wanted
    return options


def _convert(value: Any, kind: type[_T], parent: str = "") -> _T:
    """Validate a value; an error names the field, below ``parent``."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        # The place is a path such as `$.stop[0]`, or `key` in `$.logit_bias`.
        message, _, place = str(error).partition(" - at ")
        param = (parent + place.rpartition("$")[2].strip("`")).removeprefix(".") or None
        raise ApiError(400, f"{param or 'The request'}: {message}.", param) from error


def _check_consistency(request: ChatRequest, tools: list[Tool]) -> None:
    """Raise an ApiError for fields that are valid but contradict each other."""
    names = [tool.function.name for tool in tools]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"tools: the name {duplicates[0]!r} is used twice.", "tools")
    if request.max_completion_tokens not in (None, request.max_tokens):
        message = "max_tokens and max_completion_tokens differ: set only one of them."
        raise ApiError(400, message, "max_completion_tokens")
    if request.max_tokens == 0:
        raise ApiError(400, "max_tokens is 0: a chat has no answer without tokens.", "max_tokens")
    if not request.add_generation_prompt and not request.continues:
        message = "add_generation_prompt is false, so nothing would begin: set continue_final_message."
        raise ApiError(400, message, "add_generation_prompt")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs requires logprobs: true.", "top_logprobs")
    if request.offered_tools and not isinstance(request.response_format, TextFormat):
        message = 'A JSON response_format cannot be combined with tools: remove one, or set tool_choice to "none".'
        raise ApiError(400, message, "tools")
    if not tools and request.tool_choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice requires a call, but there are no tools.", "tool_choice")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise ApiError(400, f"tool_choice: no tool is named {request.tool_choice.function.name!r}.", "tool_choice")


def _chat_prompt(request: ChatRequest, tokenizer: TokenizerWrapper, template_options: Mapping[str, Any]) -> Prompt:
    if not tokenizer.has_chat_template:
        raise ApiError(400, "This model has no chat template: use /v1/completions.")
    options = {**template_options, **thinking_options(request, tokenizer)}
    if request.offered_tools and not tokenizer.has_tool_calling:
        raise ApiError(400, "mlx-lm has no parser for this model's tool calls: leave out the tools.", "tools")
    with bad_request("messages"):
        return Prompt.from_messages(
            request.conversation(),
            tokenizer,
            request.offered_tools,
            options,
            continue_final_message=request.continues,
        )


def _constraints(
    request: ChatRequest, prompt: Prompt, tokenizer: TokenizerWrapper, vocabulary: Any
) -> Sequence[constrain.Processor]:
    """Return the logits processors that make tool calls and JSON fit their schemas."""
    wanted = request.response_format
    if isinstance(wanted, JsonFormat | SchemaFormat):
        named = wanted.json_schema if isinstance(wanted, SchemaFormat) else NamedSchema("object", {"type": "object"})
        options = {"thinking": prompt.in_thought, "strict": named.strict is True, "vocabulary": vocabulary}
        with bad_request("response_format"):
            return [constrain.json(tokenizer, named.schema, **options)]
    # Without a known format of calls, "auto" leaves them unconstrained; Service has logged a warning.
    choice = request.tool_choice
    if not request.offered_tools or (choice == "auto" and not constrain.can_constrain_calls(tokenizer)):
        return []
    with bad_request("tools"):
        return [
            constrain.constrained(
                tokenizer,
                tools=request.tools,
                tool_choice=choice if isinstance(choice, str) else msgspec.to_builtins(choice),
                thinking=prompt.in_thought,
                vocabulary=vocabulary,
            )
        ]


def _sampling(request: Sampling, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    return {
        "temp": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k if request.top_k < len(tokenizer) else 0,
        "min_p": request.min_p,
        "xtc_probability": request.xtc_probability,
        "xtc_threshold": request.xtc_threshold,
        "xtc_special_tokens": xtc_special_tokens(tokenizer),
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


def _without_nulls(value: Any) -> Any:
    """Return an object without its null fields, as they mean the same as fields that were left out."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
