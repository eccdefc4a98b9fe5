"""Pieces of llguidance's dialect of Lark."""

import json
import re
from collections.abc import Sequence

NOT_INFINITE = r"~/(?s:.*[0-9][eE][+-]?[0-9]{3}.*)/"
"""Texts without an exponent of three digits, which JSON of any type could have and Python reads as infinity."""


def quote(text: str) -> str:
    """Return a text as a literal."""
    return json.dumps(text)


def without(tag: str) -> str:
    """Return a term for texts that do not contain a tag."""
    escaped = re.escape(tag).replace("/", "\\/")
    return f"~/(?s:.*{escaped}.*)/"


def one_of_calls(count: int, closing: str, rules: Sequence[str]) -> str:
    """Return a grammar of one call, and the closing tag after it.

    Args:
        count (int): Number of functions. Their rules are named ``call_0``, ``call_1`` ...
        closing (str): The closing tag as a term.
        rules (Sequence[str]): Those rules, and the ones that they refer to.
    """
    calls = " | ".join(f"call_{index}" for index in range(count))
    return "\n".join([f"start: ({calls}) {closing}", *rules]) + "\n"
