"""A tool call."""

import re
from dataclasses import dataclass

# An escape of a whole character outside the BMP, one of half a character, and any other escape.
_ESCAPE = re.compile(
    r"(?P<whole>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)


@dataclass(frozen=True)
class Call:
    """A tool call that a model wrote.

    Args:
        name (str): Name of the function.
        arguments (str): Its arguments, JSON of an object, with the digits that the model wrote.
        id (str, optional): The model's own name of the call.
    """

    name: str
    arguments: str
    id: str | None = None


def whole_characters(json: str) -> str:
    """Return JSON without escapes of half characters, which no text in UTF-8 can hold."""
    return _ESCAPE.sub(lambda found: "\\ufffd" if found["half"] else found[0], json)
