"""Tools made up by the dozen: their names, parameters and questions are drawn at random."""

import random
import re
from typing import Any

from demo.training.random_values import PARAMETERS, Pools
from demo.training.tools import Fill, Schema, Tool, expanded

_ACTIONS = {
    "create": ("make", "produce"),
    "update": ("refresh", "bring up to date"),
    "fetch": ("get", "bring"),
    "open": ("unlock",),
    "close": ("shut",),
    "set": ("put",),
    "remove": ("delete", "get rid of"),
    "check": ("test", "look at"),
    "start": ("begin", "launch"),
    "stop": ("halt", "end"),
    "find": ("look for", "search for"),
    "send": ("post",),
    "order": ("buy",),
    "save": ("store", "keep"),
    "load": ("read in",),
    "move": ("shift",),
    "rename": ("give a new name to",),
    "count": ("number",),
    "rate": ("judge",),
    "copy": ("duplicate",),
    "list": ("show", "display"),
    "print": ("write out",),
    "lock": ("secure",),
    "share": ("give out",),
    "compare": ("contrast",),
}
_FORWARD = (  # how an argument is told: its name first
    "[||the |its ]{name} {value}",
    "{name}[: |=| = | -> | => |:]{value}",
    "[||the |its |my ]{name} [is|is|should be|must be|shall be|will be|needs to be|ought to be|may "
    "be|would be] {value}",
    "[||the ]{name} [equals|becomes|reads|says|gets|takes|is to be|has to become|has to equal|has to get] {value}",
    "[||the ]{name} [set to|equal to|to|at|as|of|fixed at|put to|given as|called|being set to|being just] {value}",
    "[a|one|the] {name} of {value}",
)
_BACKWARD = (  # its value first
    "{value} [as|as|for|for|in|into|under|at] [||the |its |my ]{name}",
    "{value} [must be|should be|shall be|will be|has to be|is to be|ought to be|becomes] [||the |its ]{name}",
    "{value} [goes into|goes in|stands for|serves as|counts as|makes|fills|is for|is my|is what goes into the] {name}",
)
_FORWARD_HELD_OUT = ("{name} being {value}", "the {name} has to be {value}")
_BACKWARD_HELD_OUT = ("{value} is the {name}",)
_LITTLE_WORDS = (
    "being",
    "has",
    "is",
    "be",
    "to",
    "that",
    "which",
    "then",
    "of",
    "as",
    "at",
    "on",
    "in",
    "by",
    "so",
    "now",
    "just",
    "should",
    "must",
    "shall",
    "will",
    "would",
    "does",
    "do",
    "gets",
    "takes",
    "goes",
    "reads",
    "equals",
    "stays",
    "like",
    "than",
    "here",
    "there",
    "only",
    "always",
    "exactly",
    "simply",
    "really",
    "well",
    "too",
    "also",
    "again",
    "still",
    "it",
    "this",
)
_BY_NAME = (
    "[Call|Use|Run|Invoke|Execute|Try|Apply|Trigger|Do|Perform|Launch|Ask] [||the tool |the function |tool ]{tool}",
    "[I want|I wish|I have|I need|It is time|You need|Remember|I want you] to [call|use|run|invoke|try|execute] {tool}",
    "[Make|Start|Place|We need|I want|I would like] [a|one|the] [call|run|use] [to|of|with] {tool}",
    "[I need|We need] [the tool|the function|the help of|the answer of] {tool}",
    "[Let us|Let's|We should|You can|Can someone|Can we|Could we|Could you] [call|use|do|run] {tool}",
    "[Please|please|Now|Just|Then] [use|run|try|invoke|execute] {tool}",
    "[Answer|Work|Help me|Go on] with {tool}",
    "[This is|Here is something|Work] for {tool}",
    "{tool}",
)
_BY_NAME_HELD_OUT = ("Please call {tool}", "Can you run {tool}", "I need a call of {tool}")
_BY_DEED = (
    "{deed} [the|the|the|this|my|a|that|our] {thing}",
    "[I want|I have|I wish|I need|I would love|I would like you|You have|Remember] to {deed} [the|my|this|our] {thing}",
    "[It is time|High time|Your task is|It is necessary|My wish is] to {deed} [the|my|this|our] {thing}",
    "[Let us|Help me|We must|You should|Please|Now|Just|You can] {deed} [the|my|this|our] {thing}",
    "[Can we|Can someone|Could you|Will somebody|Would you] {deed} [the|my|this|our] {thing}",
    "{deed} {thing}",
    "[The|My|This] {thing}: [|please |now ]{deed} it",
    "I have a {thing}. Please {deed} it",
)
_BY_DEED_HELD_OUT = ("Can you {deed} the {thing}", "I would like to {deed} the {thing}", "Time to {deed} my {thing}")
_JOINTS = (" with ", " with ", ": ", " using ", ", ", " where ", " and set ", " - ", ", with ", " given ", ". ", "\n")


def tool(rng: random.Random, pools: Pools, thing: str = "") -> Tool:
    """A tool with a name, parameters and results of its own, for a thing if that is given."""
    action = rng.choice(list(_ACTIONS))
    thing = thing or some_thing(rng, pools)
    style = rng.random()
    if style < 0.6:
        name = f"{action}_{thing}"
    elif style < 0.7:
        name = f"{thing}_{action}"
    elif style < 0.8:
        name = f"{action}{thing.capitalize()}"
    else:
        name = pools.made_up(rng)
    described = rng.random() < 0.8
    describe = rng.choice(("{} the {}.", "{} the {}.", "{} a {}.", "{} one {} or more.", "{} any {} you like."))
    names = [_parameter_name(rng, pools) for _ in range(rng.choice((1, 1, 2, 2, 2, 3, 3, 4)))]
    parameters, fills = {}, {}
    for parameter in names:
        parameters[parameter], fills[parameter] = _parameter(rng, pools)
    names = list(parameters)
    needed = tuple(names if rng.random() < 0.7 else names[:1])
    results = rng.sample([*PARAMETERS, rng.choice(pools.words)], rng.randint(1, 2))
    deed = action if rng.random() < 0.7 else rng.choice(_ACTIONS[action])
    deeds = {"deed": deed, "thing": thing} if described or style < 0.8 else {}
    lists = any(schema["type"] == "array" for schema in parameters.values())  # must not run into what follows
    asks, held_out = ([_ask(rng, name, deeds, names, needed, lists, out) for _ in range(3)] for out in (False, True))
    return Tool(
        name,
        describe.format(action.capitalize(), thing) if described else f"{pools.phrase(rng).capitalize()}.",
        parameters,
        fills,
        lambda rng, pools, values: {result: _any_value(rng, pools) for result in results},
        "",
        tuple(asks),
        tuple(held_out),
        needed,
    )


def some_thing(rng: random.Random, pools: Pools) -> str:
    """What a made-up tool deals with."""
    return pools.made_up(rng) if rng.random() < 0.3 else rng.choice(pools.words)


def _parameter_name(rng: random.Random, pools: Pools) -> str:
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(PARAMETERS)
    if draw < 0.75:
        return f"{rng.choice(PARAMETERS)}_{rng.choice(PARAMETERS)}"
    return rng.choice(pools.words) if draw < 0.9 else pools.made_up(rng)


def _parameter(rng: random.Random, pools: Pools) -> tuple[Schema, Fill]:
    kind = rng.choice(("string", "string", "string", "string", "integer", "number", "boolean", "enum", "array"))
    if kind == "string":
        draws = (Pools.label, Pools.phrase, Pools.title, Pools.person, Pools.made_up, Pools.word, Pools.code)
        return {"type": "string"}, rng.choice((*draws, Pools.date, Pools.clock, Pools.city))
    if kind == "integer":
        return {"type": "integer"}, Pools.number
    if kind == "number":
        return {"type": "number"}, Pools.amount
    if kind == "boolean":
        return {"type": "boolean"}, lambda pools, rng: rng.random() < 0.5
    if kind == "enum":
        choices = sorted({pools.word(rng) for _ in range(rng.randint(2, 4))})
        return {"type": "string", "enum": choices}, lambda pools, rng: rng.choice(choices)
    return {"type": "array", "items": {"type": "string"}}, Pools.several


def _any_value(rng: random.Random, pools: Pools) -> Any:
    draws = (Pools.phrase, Pools.made_up, Pools.number, Pools.number, Pools.decimal, Pools.clock, Pools.code)
    return rng.choice(draws)(pools, rng)


def _ask(
    rng: random.Random,
    tool: str,
    deeds: dict[str, str],
    parameters: list[str],
    needed: tuple[str, ...],
    lists: bool,
    held_out: bool,
) -> str:
    """A way to ask for a made-up tool by its name or by what it does, each argument told in a way of its own."""
    unusual = held_out and rng.random() < 0.5  # what is held out: the verb, or how the arguments are told
    by_deed = bool(deeds) and rng.random() < 0.5
    usual, rare = (_BY_DEED, _BY_DEED_HELD_OUT) if by_deed else (_BY_NAME, _BY_NAME_HELD_OUT)
    verb = expanded(rng, rng.choice(rare if unusual else usual)).format(tool=tool, **deeds)
    given = [name for name in parameters if name in needed or rng.random() < 0.6]
    rng.shuffle(given)
    forward = rng.random() < 0.7
    same = _mention(rng, forward, held_out and not unusual) if rng.random() < 0.6 else ""
    parts = []
    for parameter in given:
        name = parameter.replace("_", " ") if rng.random() < 0.5 else parameter
        mention = same or _mention(rng, forward, held_out and not unusual)
        parts.append(mention.format(name=name, value=f"{{{parameter}}}"))
    if not held_out and not by_deed and rng.random() < 0.08:
        return f"{tool}({', '.join(f'{name}={{{name}}}' for name in given)})"
    comma = rng.choice((", ", ", ", "; ", " and ", "\n") if not lists else ("; ", "\n"))
    last = rng.choice((" and ", ", and ", comma)) if comma != "\n" and not lists else comma
    told = parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + last + parts[-1]
    if rng.random() < 0.15:
        return f"{rng.choice(('With ', 'Given ', 'For ')) if not held_out else 'With '}{told}, {verb}."
    end = "?" if re.match("Can|Could|Will|Would", verb) else "."
    return f"{verb[:1].upper() if by_deed else verb[:1]}{verb[1:]}{rng.choice(_JOINTS)}{told}{end}"


def _mention(rng: random.Random, forward: bool, held_out: bool) -> str:
    """How to tell an argument: its name or its value first, and between them what people say, or any little words."""
    if held_out:
        return rng.choice(_FORWARD_HELD_OUT if forward else _BACKWARD_HELD_OUT)
    if rng.random() < 0.3:
        between = " ".join(rng.sample(_LITTLE_WORDS, rng.randint(1, 3)))
        if between not in ("being", "has to be", "is"):
            return f"{{name}} {between} {{value}}" if forward else f"{{value}} {between} the {{name}}"
    mention = expanded(rng, rng.choice(_FORWARD if forward else _BACKWARD))
    return mention.replace("{value}", '"{value}"') if rng.random() < 0.15 else mention
