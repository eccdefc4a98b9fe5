"""A last message of the assistant is continued where the request asks for it."""

from typing import Any

import pytest

from tests.support.serving import DEFINITION, HERON, Running

FIELDS: list[dict[str, Any]] = [
    {"continue_final_message": True},
    {"continue_final_message": True, "add_generation_prompt": False},
    {"prefix": True},
    {"prefill": True},
]


def continued(running: Running, begun: str, fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    of_message = {key: value for key, value in fields.items() if key in ("prefix", "prefill")}
    of_request = {key: value for key, value in fields.items() if key not in of_message}
    messages = [*HERON, {"role": "assistant", "content": begun, **of_message}]
    status, answer = running.chat(messages=messages, **of_request, **more)
    assert status == 200, answer
    return answer["choices"][0]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("length", [5, 13, 30])
def test_the_answer_goes_on_where_the_message_ends(running: Running, fields: dict[str, Any], length: int) -> None:
    """The spaces between them are kept."""
    begun = DEFINITION[:length].rpartition(" ")[0] or DEFINITION[:length]
    assert begun + continued(running, begun, fields)["message"]["content"] == DEFINITION


def test_a_message_is_complete_unless_asked(running: Running) -> None:
    assert continued(running, "heron (noun): grey", {})["message"]["content"] == DEFINITION


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "messages"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued_is_refused(running: Running, fields: dict[str, Any], param: str) -> None:
    status, answer = running.chat(messages=HERON, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
