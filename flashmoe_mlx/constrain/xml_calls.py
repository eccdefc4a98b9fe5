"""Qwen's XML-style tool calls: grammars, and a reader."""

import json
import re
from collections.abc import Sequence

from flashmoe_mlx.constrain.call import Call
from flashmoe_mlx.constrain.function import Function, functions_of, variants_of
from flashmoe_mlx.constrain.lark import one_of_calls, quote, without
from flashmoe_mlx.constrain.parameter import END, Parameter
from flashmoe_mlx.constrain.schema import Schema

# llguidance records in 64 bits which parameters have been written.
_BITS = 64
_HEAD = re.compile(r"\s*<function=([^>\n]*)>")
_NEXT = re.compile(r"<parameter=([^>\n]*)>\n")
_LENIENT = re.compile(r"<parameter=\s*([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)


def xml_calls(functions: Sequence[Function], end: str, closing: str) -> list[str]:
    """Return grammars of calls in Qwen's XML style, from the opening tag on. A call must match all of them.

    Parameters come in any order.

    Args:
        functions (Sequence[Function]): Functions that may be called.
        end (str): The closing tag.
        closing (str): The closing tag as a term of the grammar.
    """
    # A closing tag inside a value would end the call there. The model can write it with an escape.
    envelope = f"start: CALL {closing}\nCALL: /(?s:.*)/ & {without(end)}\n"
    return [*(_grammar(variant, closing) for variant in variants_of(functions)), envelope]


def xml_warnings(function: Function) -> list[str]:
    """Return what of a function's schema cannot be held in XML-style calls."""
    if not is_writable(function):
        return [f"{function.name!r}: a function of this name cannot be written in this model's calls"]
    found = []
    required = function.schema.get("required", [])
    for key, parameter in parameters_of(function).items():
        is_required = key in required
        key = " ".join(key.splitlines())
        found += [f"{function.name}.{key}: {fault}" for fault in parameter.faults()]
        if is_required and not parameter.is_writable:
            found.append(f"{function.name}.{key}: it is required, but cannot be written in this model's calls")
    if len(required) > _BITS:
        found.append(f"{function.name}: of {len(required)} required parameters, {_BITS} are enforced")
    return found


def is_writable(function: Function) -> bool:
    """Say whether the name of a function can be written."""
    return re.fullmatch(r"[^<>\n]+", function.name) is not None


def parameters_of(function: Function) -> dict[str, Parameter]:
    """Return the parameters, the required ones first."""
    schema, required = function.schema, function.schema.get("required", [])
    other = schema.get("additionalProperties", {})
    properties = dict.fromkeys(required, other) | schema.get("properties", {})
    return {key: Parameter(key, part, function.definitions) for key, part in properties.items()}


def _grammar(functions: Sequence[Function], closing: str) -> str:
    return one_of_calls(len(functions), closing, [rule for i, each in enumerate(functions) for rule in _call(i, each)])


def _call(index: int, function: Function) -> list[str]:
    """Return the rules of the calls of a function."""
    head, tail, rest = quote(f"\n<function={function.name}>\n"), quote("</function>\n"), f"rest_{index}"
    parameters = {key: each for key, each in parameters_of(function).items() if each.is_writable}
    if not parameters:
        # Any names are possible where the schema says so, or could not be held.
        free = f"free_{index}[suffix={quote(END)}]: /<parameter=[^<>\\n]+>\\n(?s:.*)/"
        is_free = function.schema.get("additionalProperties", _is_open(function)) is not False
        return [f"call_{index}: {head} free_{index}* {tail}", free] if is_free else [f"call_{index}: {head} {tail}"]
    required = min(len([key for key in parameters if key in function.schema.get("required", ())]), _BITS)
    options = [f"{tail} %if is_ones([0:{required}])" if required else tail]
    rules = []
    for number, parameter in enumerate(parameters.values()):
        rule = f"parameter_{index}_{number}"
        # The last of several values counts.
        once = f"set_bit({number}) %if bit_clear({number})" if number < _BITS else "_"
        options.append(f"{rule} {rest}::{once}")
        rules += parameter.rules(rule)
    return [f"call_{index}: {head} {rest}::0x0", f"{rest}::_: {' | '.join(options)}", *rules]


def _is_open(function: Function) -> bool:
    """Say whether the function takes parameters of any name: its schema could not be held."""
    return not function.schema.get("properties") and any("left free" in warning for warning in function.warnings)


def parameters_named(name: str, tools: Sequence[Schema]) -> dict[str, Parameter]:
    """Return the parameters of the function of this name; none if there is no such function."""
    functions = functions_of([tool for tool in tools if tool["function"]["name"] == name][:1])
    return parameters_of(functions[0]) if functions else {}


def read_xml_call(text: str, tools: Sequence[Schema]) -> Call:
    """Return the call in a text between the tags.

    Args:
        text (str): The text.
        tools (Sequence[dict]): Functions that may be called, in OpenAI's form. They decide which values are texts.

    Raises:
        ValueError: It is no call.
    """
    head = _HEAD.match(text)
    if head is None or "</function>" not in text:
        raise ValueError("there is no whole function in the call")
    name = head[1].strip()
    body = text[head.end() : text.rindex("</function>")]
    written = _values(body.removeprefix("\n"))
    if written is None:
        written = {key.strip(): value for key, value in _LENIENT.findall(body)}
    parameters = parameters_named(name, tools)
    values = [
        f"{json.dumps(key, ensure_ascii=False)}: {(parameters.get(key) or Parameter(key, {}, {})).read(value)}"
        for key, value in written.items()
    ]
    return Call(name, f"{{{', '.join(values)}}}")


def _values(body: str) -> dict[str, str] | None:
    """Return the text of each parameter in the form that the grammar has; ``None`` for another form."""
    found, place = {}, 0
    while place < len(body):
        head = _NEXT.match(body, place)
        end = -1 if head is None else body.find(END, head.end())
        if head is None or end < 0:
            return None
        found[head[1]] = body[head.end() : end]
        place = end + len(END)
    return found
