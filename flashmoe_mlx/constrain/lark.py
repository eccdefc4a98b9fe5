"""Pieces of llguidance's dialect of Lark."""

import json
import re
from collections.abc import Sequence


def quote(text: str) -> str:
    """Return a text as a literal."""
    return json.dumps(text)


def without(text: str) -> str:
    """Return a term for texts that do not contain a text."""
    escaped = re.escape(text).replace("/", "\\/").replace("\n", "n")
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
