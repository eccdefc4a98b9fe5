"""Messages of OpenAI's requests, and their form for chat templates."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from flashmoe_mlx.serving.errors import ApiError


class Strict(Struct, forbid_unknown_fields=True):
    """Refuses unknown fields."""


class TextPart(Strict):
    """A text part of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class CalledFunction(Strict):
    """A function that the model called, with its arguments as JSON text or as an object."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int = 0


class _Message(Strict, tag_field="role", kw_only=True):
    content: Content
    name: str | None = None


class SystemMessage(_Message, tag="system"):
    """Instructions to the model."""


class DeveloperMessage(_Message, tag="developer"):
    """Instructions to the model, under OpenAI's newer name of the role."""


class UserMessage(_Message, tag="user"):
    """A message of the user."""


class AssistantMessage(_Message, tag="assistant", kw_only=True):
    """An earlier answer of the model."""

    content: Content = ""
    tool_calls: list[ToolCall] = []
    reasoning: str | None = None
    reasoning_content: str | None = None
    # Of a last message: the answer continues it. Mistral's and DeepSeek's name, and another one.
    prefix: bool = False
    prefill: bool = False


class ToolMessage(_Message, tag="tool", kw_only=True):
    """The result of a tool call."""

    tool_call_id: str


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def conversation_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as chat templates take them, with the results of calls in the order of the calls.

    Raises:
        ApiError: The arguments of a call are not a JSON object, or a result belongs to no call.
    """
    conversation: list[dict[str, Any]] = []
    # Positions of the calls of the last answer, by their ids: only these may have results now.
    order: dict[str, int] = {}
    results: list[tuple[int, dict[str, Any]]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in order:
                reason = f"The last answer has no call with the id {message.tool_call_id!r}."
                raise ApiError(400, reason, f"{where}.tool_call_id")
            results.append((order[message.tool_call_id], _plain(message, where)))
            continue
        conversation += [result for _, result in sorted(results, key=lambda pair: pair[0])]
        results = []
        calls = message.tool_calls if isinstance(message, AssistantMessage) else []
        order = {call.id: number for number, call in enumerate(calls)}
        conversation.append(_plain(message, where))
    return conversation + [result for _, result in sorted(results, key=lambda pair: pair[0])]


def _plain(message: Message, where: str) -> dict[str, Any]:
    """Return a message as chat templates take it."""
    role = "system" if isinstance(message, DeveloperMessage) else str(message.__struct_config__.tag)
    content = message.content
    plain: dict[str, Any] = {
        "role": role,
        "content": content if isinstance(content, str) else "".join(part.text for part in content),
    }
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if reasoning := message.reasoning or message.reasoning_content:
            plain["reasoning_content"] = reasoning
        if message.tool_calls:
            plain["tool_calls"] = [
                _plain_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(message.tool_calls)
            ]
    return plain


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        if isinstance(arguments, str):
            arguments = msgspec.json.decode(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The call's arguments are not JSON: {error}.", f"{where}.function.arguments") from error
    if not isinstance(arguments, dict):
        raise ApiError(400, "The call's arguments are not a JSON object.", f"{where}.function.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
