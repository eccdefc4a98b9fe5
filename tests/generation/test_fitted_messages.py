"""Conversations in the form that templates of many kinds take, and what is said about the changes."""

import json
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

from flashmoe_mlx.generation.fitted_messages import (
    AS_TEXT,
    GATHERED,
    IN_QUESTION,
    JOINED,
    MOVED,
    Message,
    Render,
    fit_messages,
)

ANY = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
QWEN = """{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}
{%- for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}
{{- raise('System message must be at the beginning.') }}{% endif %}
{%- elif m.role in ('user', 'assistant', 'tool') %}[{{ m.role }}]{{ m.content }}
{%- else %}{{ raise('Unexpected message role.') }}{% endif %}{% endfor %}"""
DROPS = """{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}
{%- for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"""
ALTERNATES = """{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% set messages = messages[1:] %}
{%- endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise('must alternate') }}
{%- endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"""
NO_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise('System role not supported') }}{% endif %}
{{- '[' + m.role + ']' + m.content }}{% endfor %}"""
USERS_ONLY = "{% for m in messages if m.role == 'user' %}[user]{{ m.content }}{% endfor %}"
FIRST_USER = """{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}
{%- for m in messages if m.role == 'assistant' %}[assistant]{{ m.content }}{% endfor %}"""


def template(source: str) -> Render:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    compiled = jinja2.Environment().from_string(source)
    return lambda messages: compiled.render(messages=list(messages), **{"raise": refuse})


def conversation(roles: str) -> list[Message]:
    """A message for each letter: s, d, u, a, c for an assistant's call, t for a tool's result."""
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
    messages: list[Message] = []
    for index, letter in enumerate(roles):
        message: Message = {"role": names[letter], "content": f"{letter}{index}"}
        if letter == "c":
            message["tool_calls"] = [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]
        messages.append(message)
    return messages


def shown(roles: str, source: str) -> tuple[str, list[str]]:
    render = template(source)
    messages, notes = fit_messages(conversation(roles), render)
    return render(messages), notes


@pytest.mark.parametrize("source", [ANY, QWEN, DROPS])
@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau"])
def test_what_a_template_takes_is_not_changed(roles: str, source: str) -> None:
    given = conversation(roles)
    assert fit_messages(given, template(source)) == (given, [])
    assert fit_messages(given, template(ANY)) == (given, [])


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ("ssu", "[system]s0\n\ns1[user]u2"),
        ("du", "[system]d0[user]u1"),
        ("ddu", "[system]d0\n\nd1[user]u2"),
        ("sdsuau", "[system]s0\n\nd1\n\ns2[user]u3[assistant]a4[user]u5"),
    ],
)
@pytest.mark.parametrize("source", [ANY, QWEN, DROPS, ALTERNATES])
def test_system_messages_at_the_start_become_one(roles: str, text: str, source: str) -> None:
    assert shown(roles, source) == (text, [JOINED] * (len(roles.split("u")[0]) > 1))


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ("us", "[user]u0\n\ns1"),
        ("usu", "[user]u0[user]s1\n\nu2"),
        ("usa", "[user]u0\n\ns1[assistant]a2"),
        ("suasu", "[system]s0[user]u1[assistant]a2[user]s3\n\nu4"),
        ("suas", "[system]s0[user]u1[assistant]a2[user]s3"),
        ("suddsu", "[system]s0[user]u1[user]d2\n\nd3\n\ns4\n\nu5"),
        ("ucst", "[user]u0[assistant]c1[tool]t3[user]s2"),
        ("ucts", "[user]u0[assistant]c1[tool]t2[user]s3"),
        ("uctsa", "[user]u0[assistant]c1[tool]t2[user]s3[assistant]a4"),
    ],
)
@pytest.mark.parametrize("source", [QWEN, DROPS])
def test_late_system_messages_move_to_their_neighbors(roles: str, text: str, source: str) -> None:
    assert shown(roles, source) == (text, [MOVED])
    in_place, notes = shown(roles, ANY)
    assert notes == [] and in_place == "".join(f"[{m['role']}]{m['content']}" for m in conversation(roles)).replace(
        "developer", "system"
    )


@pytest.mark.parametrize("roles", ["su", "suasu", "ssuasuas", "us", "uctsu"])
@pytest.mark.parametrize("source", [QWEN, DROPS])
def test_places_stay_the_same_while_a_conversation_grows(roles: str, source: str) -> None:
    text, _ = shown(roles, source)
    assert shown(f"{roles}a", source)[0].startswith(text)
    assert shown(f"{roles}auas", source)[0].startswith(text)


def test_other_places_are_tried_in_turn() -> None:
    """Users' messages must alternate in one, and are not shown in the other."""
    assert shown("suasu", ALTERNATES) == ("[system]s0[user]u1[assistant]a2[user]s3\n\nu4", [MOVED])
    assert shown("uasa", ALTERNATES) == ("[user]u0[assistant]a1[user]s2[assistant]a3", [MOVED])
    assert shown("sucst", FIRST_USER) == ("[system]s0\n\ns3[assistant]c2", [GATHERED])


@pytest.mark.parametrize("source", [NO_SYSTEM, USERS_ONLY])
@pytest.mark.parametrize(
    ("roles", "text"),
    [("su", "s0\n\nu1"), ("suu", "s0\n\nu1[user]u2"), ("suus", "s0\n\ns3\n\nu1[user]u2")],
)
def test_a_template_without_system_messages_gets_them_in_the_question(roles: str, text: str, source: str) -> None:
    assert shown(roles, source) == (f"[user]{text}", [IN_QUESTION])


def test_no_system_message_is_dropped_in_silence() -> None:
    with pytest.raises(ValueError, match="it drops a system message"):
        shown("su", "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(jinja2.TemplateError, match="System role not supported"):
        shown("sa", NO_SYSTEM)
    for empty in ("", " \n"):
        given = [{"role": "system", "content": empty}, {"role": "user", "content": "u"}]
        assert fit_messages(given, template(USERS_ONLY)) == (given, [])


def test_what_the_text_itself_says_does_not_hide_a_loss() -> None:
    """The second message has the text of the first."""
    given = [{"role": role, "content": "Be brief."} for role in ("system", "user", "system")]
    fitted, notes = fit_messages(given, template(DROPS))
    assert notes == [MOVED] and fitted[1]["content"] == "Be brief.\n\nBe brief."


CALLS = "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}@@{% endfor %}{% endfor %}"
DEEPSEEK = CALLS.replace("@@", "{{ '```json' + c.function.arguments + '```' }}")
PRINTS = CALLS.replace("@@", "{{ c.function.arguments }}")
AS_JSON = CALLS.replace("@@", "{{ c.function.arguments | tojson }}")
ITEMS = CALLS.replace("@@", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}")
EITHER = CALLS.replace(
    "@@", "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
)
NO_CALLS = CALLS.replace("@@", "")


@pytest.mark.parametrize("arguments", [{}, {"city": "Oslo"}, {"city": "Malmö", "days": [1, 2.5, None, True]}])
@pytest.mark.parametrize("roles", ["ucta", "sucts", "dducta"])
@pytest.mark.parametrize("source", [DEEPSEEK, PRINTS])
def test_arguments_are_text_where_a_template_cannot_write_objects(
    source: str, roles: str, arguments: dict[str, Any]
) -> None:
    """Also where Jinja would write them as Python does, which is no error but no JSON."""
    source = source.replace("{% for c", "{{ m.content }}{% for c")
    given = conversation(roles)
    call = next(message for message in given if "tool_calls" in message)
    call["tool_calls"][0]["function"]["arguments"] = arguments
    fitted, notes = fit_messages(given, template(source))
    assert AS_TEXT in notes
    assert json.dumps(arguments, ensure_ascii=False) in template(source)(fitted)
    assert call["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("source", [AS_JSON, ITEMS, EITHER, NO_CALLS])
def test_arguments_stay_objects_where_a_template_takes_them(source: str) -> None:
    given = conversation("ucta")
    assert fit_messages(given, template(source)) == (given, [])


def test_a_template_that_refuses_calls_in_any_form_says_why() -> None:
    def refuse(messages: Sequence[Message]) -> str:
        raise KeyError("tool_calls")

    assert fit_messages(conversation("uct"), refuse) == (conversation("uct"), [])
    with pytest.raises(KeyError):
        fit_messages(conversation("suct"), refuse)
