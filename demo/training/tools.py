"""Tools that the demo model learns to call, and how questions for them are phrased.

A ``Tool`` describes itself as a JSON schema and generates a ``ToolUse``: a question, the arguments of the call that
answers it, the result, and the answer. A phrasing names its arguments in braces: "What is the weather in {city}?" makes
a call with ``city`` alone. Brackets hold alternatives: "[Add|Sum] {a} and {b}." stands for two phrasings.

Two augmentations keep the model from memorizing phrasings. Word noise replaces or drops words that the tool's
description does not contain, so that a question is recognized by what it shares with the tool. Style variation adds
greetings and thanks, and changes case and punctuation. Every value is random, so that it has to be copied from the
question or from the result.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo.training.random_values import ValueSampler

Arguments = dict[str, Any]
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
# First words of a phrasing that is not an imperative, which a request such as "Could you" cannot precede.
_NOT_IMPERATIVE = re.compile(
    r"(what|how|is|are|will|which|do|does|when|where|should|i|we|my|on|from|at|in|for|it|has|there|to|with|given|after|"
    r"until|can|please|let)\b",
    re.IGNORECASE,
)

DrawValue = Callable[[ValueSampler, random.Random], Any]


@dataclass(frozen=True)
class ToolUse:
    """One question that a tool answers, with the call, its result and the answer."""

    tool: "Tool"
    question: str
    arguments: Arguments
    result: Arguments
    answer: str


@dataclass(frozen=True)
class Tool:
    """A function that a model can call.

    Attributes:
        name (str): The name of the function.
        description (str): One sentence for the schema.
        parameters (dict[str, Schema]): The JSON schema of each parameter.
        argument_values (dict[str, DrawValue]): Draws a random argument for each parameter.
        make_result (Callable): Makes the result of a call from its arguments.
        answer_template (str): The answer, with names of arguments and results in braces. Empty: the answer lists the
            results by name.
        phrasings (tuple[str, ...]): Ways to ask for the tool in training.
        held_out_phrasings (tuple[str, ...]): Ways to ask for it in evaluation. Default: none.
        required (tuple[str, ...]): The parameters that a call must have. Default: none.
        paired_phrasings (tuple[str, ...]): Ways to ask for two values of the first required parameter at once, with a
            pair of braces for each value. Default: none.
    """

    name: str
    description: str
    parameters: dict[str, Schema]
    argument_values: dict[str, DrawValue]
    make_result: Callable[[ValueSampler, random.Random, Arguments], Arguments]
    answer_template: str
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    paired_phrasings: tuple[str, ...] = ()

    def schema(self, rng: random.Random) -> Schema:
        """Return the tool's definition as a client sends it, in more or less detail."""
        detailed = rng.random() < 0.7
        properties = {
            name: {key: value for key, value in schema.items() if detailed or key != "description"}
            for name, schema in self.parameters.items()
        }
        parameters: Schema = {"type": "object", "properties": properties}
        if self.required and rng.random() < 0.85:
            parameters["required"] = list(self.required)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def sample_use(self, rng: random.Random, sampler: ValueSampler, phrasing: str = "") -> ToolUse:
        """Generate a question for the tool with its call, result and answer.

        Args:
            rng (random.Random): The source of all random choices.
            sampler (ValueSampler): Draws the values, and decides between training and held-out phrasings.
            phrasing (str): The phrasing to use as it is. Default: a random one of the tool's, augmented.
        """
        if not phrasing:
            held_out = sampler.held_out_phrasings and self.held_out_phrasings
            phrasing = choose_alternatives(rng, rng.choice(self.held_out_phrasings if held_out else self.phrasings))
            if not sampler.held_out_phrasings and rng.random() < 0.25:
                phrasing = self._add_word_noise(rng, sampler, phrasing)
            phrasing = vary_style(rng, phrasing)
        values = {name: self.argument_values[name](sampler, rng) for name in re.findall(r"{([^{}]+)}", phrasing)}
        arguments = {name: values[name] for name in self.parameters if name in values}
        quotes = {
            name: rng.choice("\"'") if _should_quote(rng, phrasing, value) else "" for name, value in values.items()
        }
        question = re.sub(
            r"{([^{}]+)}", lambda name: quotes[name[1]] + as_text(values[name[1]]) + quotes[name[1]], phrasing
        )
        if rng.random() < 0.15:
            error = rng.choice(("not found", "no connection", "not allowed", "try again later"))
            return ToolUse(self, question, arguments, {"error": error}, f"That did not work: {error}.")
        result = self.make_result(sampler, rng, arguments)
        texts = {name: as_text(value) for name, value in (arguments | result).items()}
        answer = self.answer_template.format(**texts) if self.answer_template else _list_results(result)
        return ToolUse(self, question, arguments, result, answer)

    def _add_word_noise(self, rng: random.Random, sampler: ValueSampler, phrasing: str) -> str:
        """Replace or drop some words, but none of the tool's own and none next to an argument."""
        own = f"{self.name} {self.description} {' '.join(self.parameters)}".lower()
        words = phrasing.split(" ")
        next_to_argument = {
            neighbor
            for position, word in enumerate(words)
            if "{" in word
            for neighbor in (position - 1, position, position + 1)
        }
        noisy = []
        for position, word in enumerate(words):
            letters = word.strip('.,:;?!"').lower()
            if position in next_to_argument or not letters.isalpha() or letters in own or rng.random() < 0.7:
                noisy.append(word)
            elif rng.random() < 0.6:
                noisy.append(word.lower().replace(letters, sampler.word(rng)))
        return " ".join(noisy)


def as_text(value: Any) -> str:
    """Format a value as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)


def choose_alternatives(rng: random.Random, phrasing: str) -> str:
    """Replace each pair of brackets by one of the alternatives in it, innermost first."""
    while "[" in phrasing:
        phrasing = re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), phrasing)
    return phrasing


def vary_style(rng: random.Random, phrasing: str) -> str:
    """Add a greeting or thanks, or change case and punctuation; return four of ten phrasings as they are."""
    if rng.random() < 0.4:
        return phrasing
    if rng.random() < 0.4:
        imperative = phrasing.endswith(".") and not _NOT_IMPERATIVE.match(phrasing)
        opening = rng.choice(OPENINGS + REQUESTS if imperative else OPENINGS)
        phrasing = opening + (phrasing if phrasing.startswith("I ") else phrasing[:1].lower() + phrasing[1:])
    if rng.random() < 0.25:
        phrasing = phrasing.rstrip(".?!") + rng.choice(_CLOSINGS)
    if rng.random() < 0.35:
        phrasing = phrasing.rstrip(".?!") + rng.choice(("", "", "", ".", "?", "!", "!!", "??", "...", " ?", " !"))
    if rng.random() < 0.15:
        phrasing = phrasing[:1].lower() + phrasing[1:]
    return phrasing


def _should_quote(rng: random.Random, phrasing: str, value: Any) -> bool:
    return isinstance(value, str) and '"' not in phrasing and "(" not in phrasing and rng.random() < 0.12


def _list_results(result: Arguments) -> str:
    clauses = [f"the {name.replace('_', ' ')} is {as_text(value)}" for name, value in result.items()]
    sentence = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    return f"{sentence[0].upper()}{sentence[1:]}."
