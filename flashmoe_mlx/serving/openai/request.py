"""What a client may ask for, field by field, as OpenAI's API names it. Whatever stands nowhere here is refused."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.schema import ChatRequest, NamedTool, Request, TextFormat, Tool

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Request)


def read_request(kind: type[_Request], body: bytes, defaults: Mapping[str, Any]) -> _Request:
    """Read a request's body.

    Args:
        kind: of the request.
        body (bytes): JSON in UTF-8.
        defaults: for fields that it leaves out or sets to null.

    Raises:
        ApiError: it is no JSON, or a field is wrong, missing or unknown.
    """
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
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
        _refuse_contradictions(request, _convert(request.tools, list[Tool], "tools"))
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for streams: set stream to true.", "stream_options")
    return request


def thinking_options(request: ChatRequest, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return what the chat template is told about thinking.

    Raises:
        ApiError: The request asks for something that the model or its template does not have.
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
        raise ApiError(400, "This model does not think.", "chat_template_kwargs.enable_thinking")
    if wanted is not None:
        options["enable_thinking"] = wanted
    return options


def _convert(value: Any, kind: type[_T], where: str = "") -> _T:
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        message, _, place = str(error).partition(" - at ")  # such as `$.stop[0]`, or `key` in `$.logit_bias`
        param = (where + place.rpartition("$")[2].strip("`")).removeprefix(".") or None
        raise ApiError(400, f"{param or 'The request'}: {message}.", param) from error


def _refuse_contradictions(request: ChatRequest, tools: list[Tool]) -> None:
    names = [tool.function.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"tools: {twice[0]} is there twice.", "tools")
    if request.max_completion_tokens not in (None, request.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them.", "max_completion_tokens")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", "top_logprobs")
    if tools and request.tool_choice != "none" and not isinstance(request.response_format, TextFormat):
        raise ApiError(400, "A response_format of JSON leaves no room for calls: leave out one of them.", "tools")
    if not tools and request.tool_choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice asks for a call, and there are no tools.", "tool_choice")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise ApiError(400, f"tool_choice: no tool is called {request.tool_choice.function.name!r}.", "tool_choice")


def _without_nulls(value: Any) -> Any:
    """A field that is null is one that was left out."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
