"""Hermes-style tool calls: grammars, and a reader."""

from collections.abc import Sequence

import msgspec

from flashmoe_mlx.constrain.call import Call, whole_characters
from flashmoe_mlx.constrain.function import Function, variants_of
from flashmoe_mlx.constrain.lark import one_of_calls, without
from flashmoe_mlx.constrain.schema import json_value


class _Written(msgspec.Struct):
    name: str
    # As written: numbers keep their digits.
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def json_calls(functions: Sequence[Function], end: str, closing: str) -> list[str]:
    """Return grammars of Hermes-style calls, from the opening tag on. A call must match all of them.

    Args:
        functions (Sequence[Function]): Functions that may be called.
        end (str): The closing tag.
        closing (str): The closing tag as a term of the grammar.
    """
    # A closing tag inside a string would end the call there. The model can write it with an escape.
    envelope = f'start: CALL {closing}\nCALL: "\\n" (/[^\\n]*/ & {without(end)}) "\\n"\n'
    return [*(_grammar(variant, closing) for variant in variants_of(functions)), envelope]


def _grammar(functions: Sequence[Function], closing: str) -> str:
    rules = []
    for index, function in enumerate(functions):
        call = {"name": {"enum": [function.name]}, "arguments": function.schema}
        whole = {"type": "object", "properties": call, "required": ["name", "arguments"], "additionalProperties": False}
        rules.append(f'call_{index}: "\\n" {json_value(whole, function.definitions)} "\\n"')
    return one_of_calls(len(functions), closing, rules)


def read_json_call(text: str) -> Call:
    """Return the call in a text between the tags.

    Raises:
        ValueError: It is no call.
    """
    written = msgspec.json.decode(text, type=_Written)
    arguments = bytes(written.arguments).decode()
    if not arguments.startswith("{"):
        raise ValueError("the arguments are no object")
    return Call(written.name, whole_characters(arguments))
