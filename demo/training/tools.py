"""What a tool is that the demo model is asked to use, and how people ask for it.

A ``Tool`` can describe itself as a JSON schema, and make a ``Use`` of itself: what a person asks, the arguments of the
call that answers it, what the tool returns, and the sentence that tells it. The words of a question name its arguments:
"What is the weather in {city}?" makes a call with ``city`` alone. Brackets hold alternatives: "[Add|Sum] {a} and {b}."
stands for two questions. Now and then words that the tool does not use itself are blurred, so that a question counts
for what it has in common with the tool and not for how it is put. A question is then dressed: people greet and thank,
and are careless with capitals and punctuation. Every value is drawn at random, so that it must be copied from the
question or from the result and cannot be known.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo.training.random_values import Pools

Values = dict[str, Any]
Schema = dict[str, Any]

OPENINGS = (
    "Hi! ",
    "Hello. ",
    "Hey, ",
    "Hello, ",
    "OK, ",
    "So, ",
    "Quick question: ",
    "One more thing: ",
    "Good morning. ",
    "Good evening! ",
    "I have a question: ",
    "Next: ",
    "Thanks. ",
    "Sorry to bother you, ",
    "Dear assistant, ",
    "I am in a hurry. ",
)
REQUESTS = (
    "Please ",
    "please ",
    "Could you ",
    "Could you please ",
    "Would you ",
    "Would you kindly ",
    "Will you ",
    "Can you please ",
    "Can you quickly ",
    "Can someone ",
    "I would like you to ",
    "I need you to ",
    "I want you to ",
    "Go ahead and ",
    "Now ",
    "Just ",
    "Kindly ",
    "Hey, please ",
    "Hi, could you ",
)
_CLOSINGS = (
    ", please.",
    ", please?",
    ", please",
    ", thanks.",
    ". Thanks!",
    ". Thank you.",
    ". Thank you very much!",
    ", thank you",
    ". It is important.",
    ". I am in a hurry.",
    ", if possible.",
    ", would you?",
)
_NO_ORDER = re.compile(  # how a question begins that does not tell anyone to do something
    r"(what|how|is|are|will|which|do|does|when|where|should|i|we|my|on|from|at|in|for|it|has|there|to|with|given|after|"
    r"until|can|please|let)\b",
    re.IGNORECASE,
)

Fill = Callable[[Pools, random.Random], Any]


@dataclass(frozen=True)
class Use:
    """One question that a tool answers, from asking to telling."""

    tool: "Tool"
    question: str
    arguments: Values
    result: Values
    answer: str


@dataclass(frozen=True)
class Tool:
    """A function that a model can call."""

    name: str
    description: str
    parameters: dict[str, Schema]
    fills: dict[str, Fill]
    returns: Callable[[random.Random, Pools, Values], Values]
    answer: str  # with the names of arguments and results in braces; "" tells each result by its name
    asks: tuple[str, ...]
    held_out_asks: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    both: tuple[str, ...] = ()  # ways to ask for two of its first argument at once, a pair of braces for each

    def schema(self, rng: random.Random) -> Schema:
        """How a client describes it, in more or less detail."""
        detailed = rng.random() < 0.7
        properties = {
            name: {key: value for key, value in schema.items() if detailed or key != "description"}
            for name, schema in self.parameters.items()
        }
        parameters: Schema = {"type": "object", "properties": properties}
        if self.needed and rng.random() < 0.85:
            parameters["required"] = list(self.needed)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def use(self, rng: random.Random, pools: Pools, ask: str = "") -> Use:
        """A question for it with its answer."""
        if not ask:
            ask = rng.choice(self.held_out_asks if pools.held_out and self.held_out_asks else self.asks)
            ask = expanded(rng, ask)
            if not pools.held_out and rng.random() < 0.25:
                ask = self._blurred(rng, pools, ask)
            ask = dressed(rng, ask)
        values = {name: self.fills[name](pools, rng) for name in re.findall(r"{([^{}]+)}", ask)}
        arguments = {name: values[name] for name in self.parameters if name in values}
        quotes = {name: rng.choice("\"'") if _may_quote(rng, ask, value) else "" for name, value in values.items()}
        question = re.sub(r"{([^{}]+)}", lambda n: quotes[n[1]] + spoken(values[n[1]]) + quotes[n[1]], ask)
        if rng.random() < 0.15:
            result: Values = {"error": rng.choice(("not found", "no connection", "not allowed", "try again later"))}
            return Use(self, question, arguments, result, f"That did not work: {result['error']}.")
        result = self.returns(rng, pools, arguments)
        told = {name: spoken(value) for name, value in (arguments | result).items()}
        answer = self.answer.format(**told) if self.answer else _told(result)
        return Use(self, question, arguments, result, answer)

    def _blurred(self, rng: random.Random, pools: Pools, ask: str) -> str:
        """A question in which some words are others or missing: none of the tool's own, and none beside an argument."""
        own = f"{self.name} {self.description} {' '.join(self.parameters)}".lower()
        words = ask.split(" ")
        beside = {near for place, word in enumerate(words) if "{" in word for near in (place - 1, place, place + 1)}
        blurred = []
        for place, word in enumerate(words):
            letters = word.strip('.,:;?!"').lower()
            if place in beside or not letters.isalpha() or letters in own or rng.random() < 0.7:
                blurred.append(word)
            elif rng.random() < 0.6:
                blurred.append(word.lower().replace(letters, pools.word(rng)))
        return " ".join(blurred)


def spoken(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)


def expanded(rng: random.Random, ask: str) -> str:
    """A question with one of the alternatives in each pair of brackets."""
    while "[" in ask:
        ask = re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), ask)
    return ask


def dressed(rng: random.Random, ask: str) -> str:
    """A question as people write it: with a greeting or thanks, or careless; often as it is."""
    if rng.random() < 0.4:
        return ask
    if rng.random() < 0.4:
        opening = rng.choice(OPENINGS + REQUESTS if ask.endswith(".") and not _NO_ORDER.match(ask) else OPENINGS)
        ask = opening + (ask if ask.startswith("I ") else ask[:1].lower() + ask[1:])
    if rng.random() < 0.25:
        ask = ask.rstrip(".?!") + rng.choice(_CLOSINGS)
    if rng.random() < 0.35:
        ask = ask.rstrip(".?!") + rng.choice(("", "", "", ".", "?", "!", "!!", "??", "...", " ?", " !"))
    if rng.random() < 0.15:
        ask = ask[:1].lower() + ask[1:]
    return ask


def _may_quote(rng: random.Random, ask: str, value: Any) -> bool:
    return isinstance(value, str) and '"' not in ask and "(" not in ask and rng.random() < 0.12


def _told(result: Values) -> str:
    told = [f"the {name.replace('_', ' ')} is {spoken(value)}" for name, value in result.items()]
    sentence = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return f"{sentence[0].upper()}{sentence[1:]}."
