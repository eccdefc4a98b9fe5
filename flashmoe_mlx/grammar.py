"""Grammars of tool calls and of JSON, in llguidance's dialect of Lark.

A call has to survive mlx-lm's parser, too: what it would read as something else than it is, is not in the grammar.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_MARKS = ("</parameter>", "</tool_call>")  # end a value and a call wherever they stand
_NO_MARK = "^(?:[^<]|(?:<+/)*<+[^</]|(?:<+/)+[^pt<])*(?:<+/)*<*$"  # nor anything else that begins like them
_ANNOTATIONS = {"$comment", "$schema", "default", "deprecated", "description", "examples", "readOnly", "title"}
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
_LARGEST = 2**53 - 1  # what mlx-lm's parser, which reads integers as floats, does not change
_DEEPEST = 32
_ANYTHING = {"$ref": "#/$defs/anything"}
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
_MOST_IN_ANY_ORDER = 64  # llguidance counts parameters in 64 bits


def xml_calls(functions: Sequence[Schema], ends: str) -> str:
    """Rules of ``call``: one call in Qwen's XML style, from behind its opening mark to its end.

    Args:
        functions: of OpenAI's tools: name and parameters.
        ends: what ends a call, in Lark.

    Raises:
        ValueError: a schema that no call could fit.
    """
    rules = [f"call: ({' | '.join(f'call_{index}' for index in range(len(functions)))}) {ends}"]
    for index, function in enumerate(functions):
        rules += _xml_call(f"call_{index}", function["name"], function.get("parameters") or {})
    return "\n".join(rules) + "\n"


def json_calls(functions: Sequence[Schema], ends: str) -> str:
    """Rules of ``call`` for Hermes' JSON style; see :func:`xml_calls`."""
    rules = [f"call: ({' | '.join(f'call_{index}' for index in range(len(functions)))}) {ends}"]
    for index, function in enumerate(functions):
        parameters = {"type": "object", **(function.get("parameters") or {})}
        call = {"name": {"const": function["name"]}, "arguments": parameters}
        whole = {"type": "object", "properties": call, "required": ["name", "arguments"], **_definitions(parameters)}
        rules.append(f'call_{index}: "\\n" {_held_json(function["name"], whole)} "\\n"')
    return "\n".join(rules) + "\n"


def json_value(schema: Schema) -> str:
    """JSON that fits a schema, with at most one space after a comma or colon: weak models fill files with them."""
    spacing = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return f"%json {json.dumps({**schema, 'x-guidance': spacing})}"


def quoted(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text)


def readable(tools: Sequence[Schema]) -> list[dict[str, Any]]:
    """Tools as mlx-lm's parser has to be given them to read every call of :func:`xml_calls` rightly.

    It goes by a parameter's ``type``, one word, and takes a number for text where there is none. So ``anyOf`` an
    integer or null becomes ``integer``, and what has several types ``object``, which it reads as JSON.
    """
    result = []
    for tool in tools:
        function = dict(tool["function"])
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties", {})
        typed = {key: {**value, "type": _type(_alternatives(value, parameters))} for key, value in properties.items()}
        result.append({**tool, "function": {**function, "parameters": {**parameters, "properties": typed}}})
    return result


def _xml_call(rule: str, name: str, parameters: Schema) -> Iterator[str]:
    """Parameters in any order, each once at most, and those that are required."""
    properties = parameters.get("properties", {})
    required = [key for key in parameters.get("required", ()) if key in properties]
    if missing := sorted(set(parameters.get("required", ())) - set(required)):
        raise ValueError(f"{name} requires {missing[0]}, and its properties do not have it.")
    if len(properties) > _MOST_IN_ANY_ORDER:
        raise ValueError(f"{name} has {len(properties)} parameters, and {_MOST_IN_ANY_ORDER} are possible.")
    keys = required + [key for key in properties if key not in required]
    begin, end = quoted(f"\n<function={name}>\n"), quoted("</function>\n")
    if not keys:
        yield f"{rule}: {begin} {end}"
        return
    yield f"{rule}: {begin} {rule}_rest::0x0"
    ways = [f"{end} %if is_ones([0:{len(required)}])" if required else end]
    ways += [f"{rule}_{i} {rule}_rest::set_bit({i}) %if bit_clear({i})" for i in range(len(keys))]
    yield f"{rule}_rest::_: {' | '.join(ways)}"
    for i, key in enumerate(keys):
        opening = quoted(f"<parameter={key}>\n")
        alternatives = _alternatives(properties[key], parameters)
        yield f"{rule}_{i}: {opening} {_value(f'{rule}_{i}'.upper(), f'{name}.{key}', alternatives, parameters)}"
        if _type(alternatives) == "string":
            yield _text(f"{rule}_{i}".upper(), f"{name}.{key}", alternatives)


def _value(terminal: str, where: str, alternatives: Sequence[Schema], root: Schema) -> str:
    """A value and its closing tag: plain text for strings, JSON for everything else."""
    if _type(alternatives) == "string":
        return terminal
    schema = {"anyOf": list(alternatives)} if len(alternatives) > 1 else alternatives[0]
    return f'{_held_json(where, {**schema, **_definitions(root)})} "\\n</parameter>\\n"'


def _text(terminal: str, where: str, alternatives: Sequence[Schema]) -> str:
    """A string without quotes, and its closing tag, as one terminal."""
    null = any("null" in _kinds(schema) for schema in alternatives)
    texts = []
    for schema in alternatives:
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if choices is not None:
            texts += [quoted(each) for each in choices if isinstance(each, str) and each.lower() != "null"]
        elif _kinds(schema) != {"null"}:
            marks = r"/(?s:.*)<\/(parameter|tool_call)>(?s:.*)/"
            texts.append(" & ".join(["/(?s:.*)/", f"~{marks}", "~/(?i:null)/", *_limits(schema)]))
    if null:  # mlx-lm's parser reads it as null, whatever the type
        texts.append('"null"')
    if not texts:
        raise ValueError(f"{where}: no call can carry the text null.")
    return f'{terminal}: ({" | ".join(f"( {text} )" for text in texts)}) "\\n</parameter>\\n"'


def _limits(schema: Schema) -> Iterator[str]:
    """What a schema asks of a string; ``format`` is an annotation, as in JSON Schema."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        yield f"/(?s:.{{{least},{most}}})/"
    if "pattern" in schema:
        pattern = schema["pattern"]
        begin = "" if pattern.startswith("^") else "(?s:.*)"
        end = "" if pattern.endswith("$") else "(?s:.*)"
        body = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/")
        yield f"/{begin}(?:{body}){end}/"


def _alternatives(schema: Schema, root: Schema, depth: int = 0) -> list[Schema]:
    """A schema without references at its top, and taken apart where it has several types."""
    if depth > _DEEPEST:
        raise ValueError(f"A schema refers to itself {_DEEPEST} times.")
    schema = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _alternatives({**_referred(schema["$ref"], root), **rest}, root, depth + 1)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema and (word != "allOf" or len(schema[word]) == 1):
            rest = {key: value for key, value in schema.items() if key != word}
            return [flat for each in schema[word] for flat in _alternatives({**rest, **each}, root, depth + 1)]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return [schema]


def _referred(reference: str, root: Schema) -> Schema:
    found: Any = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    if not reference.startswith("#/") or not isinstance(found, Mapping):
        raise ValueError(f"The schema refers to {reference!r}, which is not in it.")
    return found


def _kinds(schema: Schema) -> set[str]:
    """The types of a schema without alternatives; none if it may be anything."""
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return {_TYPES.get(type(value), "null") for value in values}
    return {schema["type"]} if "type" in schema else set()


def _type(alternatives: Sequence[Schema]) -> str:
    """The one word by which mlx-lm's parser reads a parameter."""
    kinds = set[str]()
    for schema in alternatives:
        kinds |= _kinds(schema) or ({"any"} if schema else {"string"})  # of anything, a text is the plainest
    kinds -= {"null"}
    if kinds == {"integer", "number"}:
        return "number"
    return kinds.pop() if len(kinds) == 1 and kinds != {"any"} else "object"


def _definitions(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _held_json(where: str, schema: Schema) -> str:
    held = _held(schema)
    held["$defs"] = {**held.get("$defs", {}), "anything": _held_anything()}
    if any(mark in json.dumps(held) for mark in _MARKS):
        raise ValueError(f"{where}: a name or value has {_MARKS[0]} or {_MARKS[1]} in it, which ends a call.")
    return json_value(held)


def _held_anything() -> dict[str, Any]:
    kinds = [{"type": kind} for kind in ("boolean", "null")]
    return {"anyOf": [*kinds, *(_held({"type": kind}) for kind in ("string", "number", "array", "object"))]}


def _held(schema: Any) -> dict[str, Any]:
    """The schema with only such strings, numbers and names as come through a parser unharmed."""
    if schema is True or schema == {}:
        return dict(_ANYTHING)
    if schema is False:
        return {"not": {}}
    held = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    for word in ("properties", "patternProperties", "$defs", "definitions"):
        if word in held:
            held[word] = {key: _held(value) for key, value in held[word].items()}
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if word in held:
            held[word] = [_held(each) for each in held[word]]
    if held.get("format") not in _FORMATS:
        held.pop("format", None)
    if "enum" in held or "const" in held:
        return held
    kinds = held.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if "string" in kinds and not held.keys() & {"pattern", "format"}:
        held["pattern"] = _NO_MARK
    if kinds & {"integer", "number"}:
        if not held.keys() & {"minimum", "exclusiveMinimum"}:
            held["minimum"] = -_LARGEST
        if not held.keys() & {"maximum", "exclusiveMaximum"}:
            held["maximum"] = _LARGEST
    if "array" in kinds:
        held["items"] = _held(held.get("items", True))
    if "object" in kinds:
        others = held.get("additionalProperties", True)
        if "properties" in held or "patternProperties" in held:
            held["additionalProperties"] = _held(others) if isinstance(others, Mapping) else False
        elif others is not False:
            held["patternProperties"] = {_NO_MARK: _held(others)}
            held["additionalProperties"] = False
    return held
