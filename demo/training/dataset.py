"""The training data of the demo model: dictionary entries and dialogues, generated from a seed.

A ``Dataset`` has the words of WordNet and the names of cities, split into a training and a held-out part, and generates
any number of documents about them. The same seed and document number always give the same document. Held-out words,
cities and phrasings are for evaluation: they never occur in training documents, only in ``held_out_call``.
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from demo.training import wordnet
from demo.training.generated_tools import generate_tool, sample_noun
from demo.training.handwritten_tools import HANDWRITTEN_TOOLS
from demo.training.random_values import ValueSampler
from demo.training.tools import Schema, Tool, ToolUse
from demo.training.wordnet import Entry

Message = dict[str, Any]

SEED = 7
# In addition to all animals, plants, foods and artifacts.
FREQUENT_WORDS = 7000
HELD_OUT_SYNSETS = 500
HELD_OUT_CITIES = 150

_NOUN_QUESTIONS = ("What is {a} {word}?", "what is {a} {word}", "What's {a} {word}?", "Do you know what {a} {word} is?")
_WORD_QUESTIONS = (
    "What is {word}?",
    "Define {word}.",
    "define {word}",
    "Define the word {word}.",
    "What does {word} mean?",
    "what does {word} mean",
    "What does the word {word} mean?",
    'What does "{word}" mean?',
    "What is the meaning of {word}?",
    "Tell me what {word} means.",
    "Give me the definition of {word}.",
    "Can you define {word}?",
    "Please explain the word {word}.",
    "Look up {word}.",
    "definition of {word}",
    "{word}",
    "{word}?",
    "{Word}",
    "{Word}?",
    "What is {Word}?",
)
_SYSTEM_PROMPTS = (
    "You are a pocket dictionary.",
    "You are a helpful assistant.",
    "You are a dictionary that can use tools.",
    "Answer briefly.",
    "Be helpful and short.",
)
_REPEAT_REQUESTS = (
    "Repeat: {}",
    'Repeat "{}".',
    'Say "{}".',
    "Say after me: {}",
    "Echo: {}",
    'Please repeat "{}"',
    "Copy this: {}",
)
_UNKNOWN_WORD = "I do not know the word {}."
_NO_TOOL = "I have no tool for that."


@dataclass(frozen=True)
class Example:
    """One document: a dialogue, or plain text.

    Attributes:
        messages (list[Message]): The dialogue, as for a chat template. Default: empty.
        tools (list[Schema]): The tools that the dialogue offers. Default: none.
        text (str): Plain text, in place of a dialogue. Default: empty.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[Schema] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Dataset:
    """Words and cities, split into training and held-out ones, and documents about them by number.

    Attributes:
        seed (int): The seed of the split and of every document.
        entries (list[Entry]): The words that training defines.
        held_out (list[Entry]): The words that it does not.
        sampler (ValueSampler): Draws training values.
        held_out_sampler (ValueSampler): Draws held-out cities, and makes tools use held-out phrasings.
    """

    seed: int
    entries: list[Entry]
    held_out: list[Entry]
    sampler: ValueSampler
    held_out_sampler: ValueSampler

    @classmethod
    def load(cls, folder: Path, seed: int) -> Self:
        """Read WordNet's words and cities, and split them by a seed.

        Args:
            folder (Path): The folder with WordNet's database files.
            seed (int): The seed of the split and of every document.

        Raises:
            SystemExit: The folder has no ``data.noun``.
        """
        if not (folder / "data.noun").is_file():
            raise SystemExit(
                f"{folder} has no data.noun: `apt-get download wordnet-base && dpkg -x wordnet-base*.deb .`"
            )
        rng = random.Random(f"{seed} split")
        entries = wordnet.entries(folder)
        by_frequency = sorted((e for e in entries if not e.everyday), key=lambda e: (-e.count, e.word))
        frequent = by_frequency[:FREQUENT_WORDS]
        chosen = [e for e in entries if e.everyday] + frequent
        # Synonyms share a definition, so whole synsets are held out.
        held_out = set(rng.sample(sorted({e.synset for e in chosen}), HELD_OUT_SYNSETS))
        cities = wordnet.cities(folder)
        rng.shuffle(cities)
        nouns = [e.word for e in frequent if e.part == "noun"]
        return cls(
            seed,
            sorted((e for e in chosen if e.synset not in held_out), key=lambda e: e.word),
            [e for e in chosen if e.synset in held_out],
            ValueSampler(sorted(cities[HELD_OUT_CITIES:]), nouns),
            ValueSampler(sorted(cities[:HELD_OUT_CITIES]), nouns, held_out_phrasings=True),
        )

    def _rng(self, kind: str, number: int) -> random.Random:
        return random.Random(f"{self.seed} {kind} {number}")

    def plain_entry(self, number: int) -> Example:
        """Return a dictionary entry as plain text."""
        return Example(text=self.entries[number % len(self.entries)].line)

    def definition(self, number: int) -> Example:
        """Generate one question about a word; consecutive numbers go through all words."""
        rng = self._rng("definition", number)
        return Example(_maybe_system(rng, 0.25) + _define(rng, self.entries[number % len(self.entries)]))

    def chat(self, number: int) -> Example:
        """Generate one to four questions about words, some of them about words that do not exist."""
        rng = self._rng("chat", number)
        messages = _maybe_system(rng, 0.25)
        for _ in range(rng.randint(1, 4)):
            messages += self._word_exchange(rng)
        return Example(messages)

    def tool_dialogue(self, number: int) -> Example:
        """Generate a dialogue that offers tools, and in which most questions need one of them."""
        rng = self._rng("tool", number)
        tools = _sample_tools(rng, self.sampler)
        messages = _maybe_system(rng, 0.2)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            choice = rng.random()
            if choice < 0.77:
                messages += _call_tools(*_sample_uses(rng, self.sampler, tools))
            elif choice < 0.85:
                messages += self._word_exchange(rng)
            elif choice < 0.9:
                messages += _repeat(rng, self.sampler)
            else:
                messages += _exchange(_question_for_missing_tool(rng, self.sampler, tools), _NO_TOOL)
        return Example(messages, [tool.schema(rng) for tool in tools])

    def without_tools(self, number: int) -> Example:
        """Generate a question that needs a tool in a dialogue that offers none."""
        rng = self._rng("without tools", number)
        question = rng.choice(HANDWRITTEN_TOOLS).sample_use(rng, self.sampler).question
        return Example(_maybe_system(rng, 0.25) + _exchange(question, _NO_TOOL))

    def held_out_call(self, number: int, handwritten: bool, held_out_phrasing: bool = True) -> Example:
        """Generate a question about held-out values that needs one call of a tool.

        Args:
            number (int): The number of the document.
            handwritten (bool): Ask for a handwritten tool, else for a generated one.
            held_out_phrasing (bool): Use a phrasing that training never has, else one that it has.
                Default: ``True``.
        """
        rng = self._rng(f"held-out {handwritten} {held_out_phrasing}", number)
        sampler = replace(self.held_out_sampler, held_out_phrasings=held_out_phrasing)
        tool = rng.choice(HANDWRITTEN_TOOLS) if handwritten else generate_tool(rng, sampler)
        tools = [tool, *(other for other in _sample_tools(rng, sampler) if other.name != tool.name)]
        use = tool.sample_use(rng, sampler)
        messages = _call_tools(use.question, [use])
        rng.shuffle(tools)
        return Example(messages, [each.schema(rng) for each in tools])

    def _word_exchange(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.08:
            word = self.sampler.pseudoword(rng)
            return _exchange(_word_question(rng, word, "noun"), _UNKNOWN_WORD.format(word))
        return _define(rng, rng.choice(self.entries))


def plain_definition(entry: Entry) -> list[Message]:
    """Return the plainest question about a word, with its answer."""
    return _exchange(f"What does {entry.word} mean?", entry.line)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _maybe_system(rng: random.Random, probability: float) -> list[Message]:
    return [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}] if rng.random() < probability else []


def _word_question(rng: random.Random, word: str, part: str) -> str:
    questions = _NOUN_QUESTIONS if part == "noun" and rng.random() < 0.4 else _WORD_QUESTIONS
    article = "an" if word[0] in "aeiou" else "a"
    return rng.choice(questions).format(word=word, Word=word.capitalize(), a=article)


def _define(rng: random.Random, entry: Entry) -> list[Message]:
    return _exchange(_word_question(rng, entry.word, entry.part), entry.line)


def _sample_tools(rng: random.Random, sampler: ValueSampler) -> list[Tool]:
    """Return one to five tools with different names; some lists have similar tools on purpose."""
    count = min(rng.randint(1, 5), rng.randint(1, 8))
    handwritten = sum(rng.random() < 0.6 for _ in range(count))
    if rng.random() < 0.4:
        start = rng.randrange(len(HANDWRITTEN_TOOLS) - handwritten)
        tools = list(HANDWRITTEN_TOOLS[start : start + handwritten])
    else:
        tools = rng.sample(HANDWRITTEN_TOOLS, handwritten)
    noun = sample_noun(rng, sampler) if rng.random() < 0.3 else ""
    tools += [generate_tool(rng, sampler, noun) for _ in range(count - handwritten)]
    rng.shuffle(tools)
    return list({tool.name: tool for tool in tools}.values())


def _question_for_missing_tool(rng: random.Random, sampler: ValueSampler, tools: list[Tool]) -> str:
    names = {tool.name for tool in tools}
    if rng.random() < 0.25:
        return generate_tool(rng, sampler).sample_use(rng, sampler).question
    missing = [tool for tool in HANDWRITTEN_TOOLS if tool.name not in names]
    return rng.choice(missing).sample_use(rng, sampler).question


def _repeat(rng: random.Random, sampler: ValueSampler) -> list[Message]:
    draws = (ValueSampler.sentence, ValueSampler.code, ValueSampler.title, ValueSampler.pseudoword)
    text = rng.choice(draws)(sampler, rng)
    return _exchange(rng.choice(_REPEAT_REQUESTS).format(text), text)


def _sample_uses(rng: random.Random, sampler: ValueSampler, tools: list[Tool]) -> tuple[str, list[ToolUse]]:
    """Return a question with the one or two tool uses that answer it."""
    first = rng.choice(tools)
    if first.paired_phrasings and rng.random() < 0.15:
        value = f"{{{first.required[0]}}}"
        pair = [first.sample_use(rng, sampler, value), first.sample_use(rng, sampler, value)]
        return rng.choice(first.paired_phrasings).format(*(use.question for use in pair)), pair
    uses = [first.sample_use(rng, sampler)]
    if rng.random() < 0.12:
        uses.append(rng.choice(tools).sample_use(rng, sampler))
    return rng.choice((" ", " And ", " Also: ")).join(use.question for use in uses), uses


def _call_tools(question: str, uses: list[ToolUse]) -> list[Message]:
    calls = [{"type": "function", "function": {"name": use.tool.name, "arguments": use.arguments}} for use in uses]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": use.result} for use in uses),
        {"role": "assistant", "content": " ".join(use.answer for use in uses)},
    ]
