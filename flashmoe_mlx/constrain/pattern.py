"""Patterns and formats of texts that are written without quotes."""

import re

# An escaped character, a class, or any other character.
_TOKEN = re.compile(r"\\[\s\S]|\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]|[\s\S]")

_CLASSES = {"\\d": "[0-9]", "\\D": "[^0-9]", "\\w": "[A-Za-z0-9_]", "\\W": "[^A-Za-z0-9_]"}
_CLASSES |= {"\\s": "[ \\t\\r\\n]", "\\S": "[^ \\t\\r\\n]"}

_DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"[1-9][0-9]{{3}}-{_DAY}"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# Every text of these fits the format; a few rare ones, such as February 29, are left out.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": "[A-Za-z0-9_+-]+(?:\\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\\.[A-Za-z0-9]+)+",
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
}
"""A pattern of the whole text, for each format that is held."""


def whole_text(pattern: str) -> str | None:
    """Turn a pattern that may match anywhere into one that matches the whole text, for llguidance.

    Args:
        pattern (str): The pattern.

    Returns:
        str, optional: The other pattern; ``None`` if there are anchors inside it.
    """
    depth, choices = 0, [[]]  # type: int, list[list[str]]
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            choices.append([])
        else:
            choices[-1].append(token)
    wholes = [_whole(tokens) for tokens in choices]
    return None if None in wholes else "|".join(f"(?:{whole})" for whole in wholes)


def _whole(tokens: list[str]) -> str | None:
    starts, ends = tokens[:1] == ["^"], tokens[-1:] == ["$"]
    body = tokens[starts : len(tokens) - ends]
    if "^" in body or "$" in body:
        return None
    text = "".join(_escaped(token) for token in body)
    return f"{'' if starts else '(?s:.*)'}(?:{text}){'' if ends else '(?s:.*)'}"


def _escaped(token: str) -> str:
    if token in _CLASSES:
        return _CLASSES[token]
    # A class may have classes inside.
    if token.startswith("["):
        token = re.sub(r"\\[\s\S]", lambda found: _CLASSES.get(found[0], found[0]), token)
    return re.sub(r"\\[\s\S]|/", lambda found: "\\/" if found[0] == "/" else found[0], token).replace("\n", "\\n")
