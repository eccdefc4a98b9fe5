"""Tools generated at random: their names, parameters, results and phrasings."""

import random
import re
from typing import Any

from demo.training.random_values import PARAMETER_NAMES, ValueSampler
from demo.training.tools import DrawValue, Schema, Tool, choose_alternatives

# Verbs in names of tools, each with synonyms that questions use instead.
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
# Ways to state an argument, name before value.
_NAME_FIRST = (
    "[||the |its ]{name} {value}",
    "{name}[: |=| = | -> | => |:]{value}",
    "[||the |its |my ]{name} [is|is|should be|must be|shall be|will be|needs to be|ought to be|may "
    "be|would be] {value}",
    "[||the ]{name} [equals|becomes|reads|says|gets|takes|is to be|has to become|has to equal|has to get] {value}",
    "[||the ]{name} [set to|equal to|to|at|as|of|fixed at|put to|given as|called|being set to|being just] {value}",
    "[a|one|the] {name} of {value}",
)
# Ways to state an argument, value before name.
_VALUE_FIRST = (
    "{value} [as|as|for|for|in|into|under|at] [||the |its |my ]{name}",
    "{value} [must be|should be|shall be|will be|has to be|is to be|ought to be|becomes] [||the |its ]{name}",
    "{value} [goes into|goes in|stands for|serves as|counts as|makes|fills|is for|is my|is what goes into the] {name}",
)
_NAME_FIRST_HELD_OUT = ("{name} being {value}", "the {name} has to be {value}")
_VALUE_FIRST_HELD_OUT = ("{value} is the {name}",)
# One to three of these may stand between the name and the value of an argument, whether that makes sense or not.
_FILLER_WORDS = (
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
# Requests that name the tool.
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
# Requests that say what the tool does.
_BY_ACTION = (
    "{action} [the|the|the|this|my|a|that|our] {noun}",
    "[I want|I have|I wish|I need|I would love|I would like you|You have|Remember] to {action} "
    "[the|my|this|our] {noun}",
    "[It is time|High time|Your task is|It is necessary|My wish is] to {action} [the|my|this|our] {noun}",
    "[Let us|Help me|We must|You should|Please|Now|Just|You can] {action} [the|my|this|our] {noun}",
    "[Can we|Can someone|Could you|Will somebody|Would you] {action} [the|my|this|our] {noun}",
    "{action} {noun}",
    "[The|My|This] {noun}: [|please |now ]{action} it",
    "I have a {noun}. Please {action} it",
)
_BY_ACTION_HELD_OUT = (
    "Can you {action} the {noun}",
    "I would like to {action} the {noun}",
    "Time to {action} my {noun}",
)
# What stands between a request and its arguments.
_SEPARATORS = (
    " with ",
    " with ",
    ": ",
    " using ",
    ", ",
    " where ",
    " and set ",
    " - ",
    ", with ",
    " given ",
    ". ",
    "\n",
)


def generate_tool(rng: random.Random, sampler: ValueSampler, noun: str = "") -> Tool:
    """Generate a tool with a random name, parameters, results and phrasings.

    Args:
        rng (random.Random): The source of all random choices.
        sampler (ValueSampler): Draws words and values.
        noun (str): The thing that the tool acts on. Default: a random noun.
    """
    action = rng.choice(list(_ACTIONS))
    noun = noun or sample_noun(rng, sampler)
    style = rng.random()
    if style < 0.6:
        name = f"{action}_{noun}"
    elif style < 0.7:
        name = f"{noun}_{action}"
    elif style < 0.8:
        name = f"{action}{noun.capitalize()}"
    else:
        name = sampler.pseudoword(rng)
    described = rng.random() < 0.8
    template = rng.choice(("{} the {}.", "{} the {}.", "{} a {}.", "{} one {} or more.", "{} any {} you like."))
    names = [_parameter_name(rng, sampler) for _ in range(rng.choice((1, 1, 2, 2, 2, 3, 3, 4)))]
    parameters, argument_values = {}, {}
    for parameter in names:
        parameters[parameter], argument_values[parameter] = _parameter(rng, sampler)
    names = list(parameters)
    required = tuple(names if rng.random() < 0.7 else names[:1])
    results = rng.sample([*PARAMETER_NAMES, rng.choice(sampler.words)], rng.randint(1, 2))
    asked_action = action if rng.random() < 0.7 else rng.choice(_ACTIONS[action])
    action_and_noun = {"action": asked_action, "noun": noun} if described or style < 0.8 else {}
    has_list = any(schema["type"] == "array" for schema in parameters.values())
    phrasings, held_out_phrasings = (
        [_phrasing(rng, name, action_and_noun, names, required, has_list, held_out) for _ in range(3)]
        for held_out in (False, True)
    )
    description = template.format(action.capitalize(), noun) if described else f"{sampler.phrase(rng).capitalize()}."
    return Tool(
        name=name,
        description=description,
        parameters=parameters,
        argument_values=argument_values,
        make_result=lambda sampler, rng, arguments: {result: _any_value(rng, sampler) for result in results},
        answer_template="",
        phrasings=tuple(phrasings),
        held_out_phrasings=tuple(held_out_phrasings),
        required=required,
    )


def sample_noun(rng: random.Random, sampler: ValueSampler) -> str:
    """Return a noun, or sometimes a pseudoword, for a generated tool to act on."""
    return sampler.pseudoword(rng) if rng.random() < 0.3 else rng.choice(sampler.words)


def _parameter_name(rng: random.Random, sampler: ValueSampler) -> str:
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(PARAMETER_NAMES)
    if draw < 0.75:
        return f"{rng.choice(PARAMETER_NAMES)}_{rng.choice(PARAMETER_NAMES)}"
    return rng.choice(sampler.words) if draw < 0.9 else sampler.pseudoword(rng)


def _parameter(rng: random.Random, sampler: ValueSampler) -> tuple[Schema, DrawValue]:
    kind = rng.choice(("string", "string", "string", "string", "integer", "number", "boolean", "enum", "array"))
    if kind == "string":
        strings: tuple[DrawValue, ...] = (
            ValueSampler.label,
            ValueSampler.phrase,
            ValueSampler.title,
            ValueSampler.person,
            ValueSampler.pseudoword,
            ValueSampler.word,
            ValueSampler.code,
            ValueSampler.date,
            ValueSampler.time_of_day,
            ValueSampler.city,
        )
        return {"type": "string"}, rng.choice(strings)
    if kind == "integer":
        return {"type": "integer"}, ValueSampler.integer
    if kind == "number":
        return {"type": "number"}, ValueSampler.amount
    if kind == "boolean":
        return {"type": "boolean"}, lambda sampler, rng: rng.random() < 0.5
    if kind == "enum":
        choices = sorted({sampler.word(rng) for _ in range(rng.randint(2, 4))})
        return {"type": "string", "enum": choices}, lambda sampler, rng: rng.choice(choices)
    return {"type": "array", "items": {"type": "string"}}, ValueSampler.word_list


def _any_value(rng: random.Random, sampler: ValueSampler) -> Any:
    draws: tuple[DrawValue, ...] = (
        ValueSampler.phrase,
        ValueSampler.pseudoword,
        ValueSampler.integer,
        ValueSampler.integer,
        ValueSampler.decimal,
        ValueSampler.time_of_day,
        ValueSampler.code,
    )
    return rng.choice(draws)(sampler, rng)


def _phrasing(
    rng: random.Random,
    tool: str,
    action_and_noun: dict[str, str],
    parameters: list[str],
    required: tuple[str, ...],
    has_list: bool,
    held_out: bool,
) -> str:
    """Generate a phrasing that asks for a tool by its name or its action, with its arguments.

    Args:
        rng (random.Random): The source of all random choices.
        tool (str): The name of the tool.
        action_and_noun (dict[str, str]): The verb and the noun that describe the tool; empty if neither its name nor
            its description has them.
        parameters (list[str]): The names of its parameters.
        required (tuple[str, ...]): The names of those that every question gives.
        has_list (bool): Some arguments are lists, whose commas must not be mistaken for those between arguments.
        held_out (bool): Use a request or a statement of arguments that training never has.
    """
    held_out_request = held_out and rng.random() < 0.5
    held_out_statement = held_out and not held_out_request
    by_action = bool(action_and_noun) and rng.random() < 0.5
    usual, rare = (_BY_ACTION, _BY_ACTION_HELD_OUT) if by_action else (_BY_NAME, _BY_NAME_HELD_OUT)
    request = choose_alternatives(rng, rng.choice(rare if held_out_request else usual))
    request = request.format(tool=tool, **action_and_noun)
    given = [name for name in parameters if name in required or rng.random() < 0.6]
    rng.shuffle(given)
    name_first = rng.random() < 0.7
    shared_template = _argument_template(rng, name_first, held_out_statement) if rng.random() < 0.6 else ""
    statements = []
    for parameter in given:
        name = parameter.replace("_", " ") if rng.random() < 0.5 else parameter
        template = shared_template or _argument_template(rng, name_first, held_out_statement)
        statements.append(template.format(name=name, value=f"{{{parameter}}}"))
    if not held_out and not by_action and rng.random() < 0.08:
        return f"{tool}({', '.join(f'{name}={{{name}}}' for name in given)})"
    comma = rng.choice((", ", ", ", "; ", " and ", "\n") if not has_list else ("; ", "\n"))
    last = rng.choice((" and ", ", and ", comma)) if comma != "\n" and not has_list else comma
    arguments = statements[0] if len(statements) == 1 else comma.join(statements[:-1]) + last + statements[-1]
    if rng.random() < 0.15:
        return f"{rng.choice(('With ', 'Given ', 'For ')) if not held_out else 'With '}{arguments}, {request}."
    end = "?" if re.match("Can|Could|Will|Would", request) else "."
    if by_action:
        request = request[:1].upper() + request[1:]
    return f"{request}{rng.choice(_SEPARATORS)}{arguments}{end}"


def _argument_template(rng: random.Random, name_first: bool, held_out: bool) -> str:
    """Return a template that states an argument: its name, its value, and common or filler words between them."""
    if held_out:
        return rng.choice(_NAME_FIRST_HELD_OUT if name_first else _VALUE_FIRST_HELD_OUT)
    if rng.random() < 0.3:
        between = " ".join(rng.sample(_FILLER_WORDS, rng.randint(1, 3)))
        # These make a held-out template.
        if between not in ("being", "has to be", "is"):
            return f"{{name}} {between} {{value}}" if name_first else f"{{value}} {between} the {{name}}"
    template = choose_alternatives(rng, rng.choice(_NAME_FIRST if name_first else _VALUE_FIRST))
    return template.replace("{value}", '"{value}"') if rng.random() < 0.15 else template
