"""Messages in a form that a chat template takes without dropping any of them."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""A message as chat templates take it: ``role``, ``content``, and e.g. ``tool_calls``."""

Render = Callable[[Sequence[Message]], str]
"""Returns the text of messages, or raises an exception of any type."""

JOINED = "the system messages at the start were joined into one"
MOVED = "system messages after the start were moved into user messages: the chat template does not take them there"
GATHERED = "all system messages were joined at the start: the chat template does not take them elsewhere"
IN_QUESTION = "the system messages were moved into the first user message: the chat template does not take any"
AS_TEXT = "the arguments of earlier calls are given to the chat template as text: it does not take an object"


def fit_messages(messages: Sequence[Message], render: Render) -> tuple[list[Message], list[str]]:
    """Return messages that a chat template takes, and how they differ from the given ones.

    Developer messages become system messages, and those at the start become one. If the template rejects or drops a
    later one, it moves into the user message next to it, or becomes one; if that does not help, all are joined at the
    start, or else in the first user message. Arguments of calls become JSON text if the template cannot write objects.

    Templates are tried with placeholders in place of those texts, which shows what is dropped.

    Args:
        messages (Sequence[dict]): The conversation. The arguments of its calls are mappings.
        render (Callable): Renders messages with the template.

    Returns:
        tuple: (messages, notes for people).

    Raises:
        Exception: The template rejects the messages in every form, as it rejects them in the first one.
        ValueError: It drops a system message in every form.
    """
    fitted, notes = [_as_system(message) for message in messages], []
    joined = _join_leading(fitted)
    if len(joined) < len(fitted):
        fitted = joined
        notes.append(JOINED)
    if _takes_text(fitted, render):
        fitted = [with_arguments(message, _as_text) for message in fitted]
        notes.append(AS_TEXT)
    move = _find_move(fitted, render)
    if move is not None:
        fitted = _MOVES[move](fitted)
        notes.append(move)
    return fitted, notes


def _as_system(message: Message) -> Message:
    return message | {"role": "system"} if message["role"] == "developer" else message


def _join_leading(messages: Sequence[Message]) -> list[Message]:
    """Join the system messages at the start by blank lines."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [_joined(messages[:count], messages[0]), *messages[count:]] if count > 1 else list(messages)


def _takes_text(messages: Sequence[Message], render: Render) -> bool:
    """Say whether a template takes arguments of calls as JSON text only."""
    if not any(message.get("tool_calls") for message in messages):
        return False
    mark = _mark()
    # The template may reject system messages, too, which is another matter.
    rest = [message for message in messages if message["role"] != "system"]

    def shown(change: Callable[[Any], Any]) -> str | None:
        try:
            return render([with_arguments(message, lambda _: change({mark: mark})) for message in rest])
        # Templates raise errors of many types.
        except Exception:
            return None

    as_object = shown(dict)
    # Jinja writes an object as Python does, in single quotes.
    if as_object is not None and str({mark: mark}) not in as_object:
        return False
    as_text = shown(_as_text)
    return as_text is not None and _as_text({mark: mark}) in as_text


def with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """Return a message with changed arguments of its calls."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": change(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _find_move(messages: Sequence[Message], render: Render) -> str | None:
    """Return the name of the first move after which a template shows all system messages; ``None`` without any."""
    marks: list[str] = []
    marked: list[Message] = []
    for message in messages:
        # Nothing is lost with an empty message.
        if message["role"] == "system" and str(message["content"]).strip():
            marks.append(_mark())
            message = message | {"content": marks[-1]}
        marked.append(message)
    if not marks:
        return None
    rejection: Exception = ValueError("it drops a system message")
    for name in (None, *_MOVES):
        moved = marked if name is None else _MOVES[name](marked)
        if name is not None and moved == marked:
            continue
        try:
            text = render(moved)
        except Exception as error:
            if name is None:
                rejection = error
            continue
        if all(mark in text for mark in marks):
            return name
    raise rejection


def _into_neighbors(messages: Sequence[Message]) -> list[Message]:
    """Move late system messages into the user message after or before them, or make them one.

    The place depends only on what is next to a message, so it stays the same while the conversation grows.
    """
    head = 1 if messages[0]["role"] == "system" else 0
    moved: list[Message] = list(messages[:head])
    waiting: list[Message] = []
    for message in [*messages[head:], None]:
        if message is not None and message["role"] == "system":
            waiting.append(message)
            continue
        # Nothing may stand between calls and their results.
        if waiting and (message is None or message["role"] != "tool"):
            if message is not None and message["role"] == "user":
                message = _joined([*waiting, message], message)
            elif moved and moved[-1]["role"] == "user":
                moved[-1] = _joined([moved[-1], *waiting], moved[-1])
            else:
                moved.append(_joined(waiting, {"role": "user"}))
            waiting = []
        if message is not None:
            moved.append(message)
    return moved


def _to_start(messages: Sequence[Message]) -> list[Message]:
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return [_joined(system, system[0]), *rest]


def _into_question(messages: Sequence[Message]) -> list[Message]:
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return list(messages)
    return [*rest[:first], _joined([*system, rest[first]], rest[first]), *rest[first + 1 :]]


_MOVES: Mapping[str, Callable[[Sequence[Message]], list[Message]]] = {
    MOVED: _into_neighbors,
    GATHERED: _to_start,
    IN_QUESTION: _into_question,
}


def _joined(messages: Sequence[Message], head: Message) -> Message:
    """Return ``head`` with the texts of messages, separated by blank lines."""
    texts = [str(message["content"]) for message in messages if message["content"]]
    return head | {"content": "\n\n".join(texts)}


def _mark() -> str:
    return f"text-{uuid.uuid4().hex}"
