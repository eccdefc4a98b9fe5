"""What the demo model reads in training: dictionary entries and dialogues, all drawn from a seed.

A ``Recipe`` knows WordNet's words and cities, which of them are held out, and how to write any number of dialogues
about the others. The same seed and number always give the same dialogue. Held-out words are defined nowhere in
training; held-out cities and phrasings of questions to tools occur only in ``call``.
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from demo.training import generated_tools, wordnet
from demo.training.handwritten_tools import WRITTEN
from demo.training.random_values import Pools
from demo.training.tools import Schema, Tool, Use
from demo.training.wordnet import Entry

Message = dict[str, Any]

SEED = 7

FREQUENT_WORDS = 7000  # beside every animal, plant, food and made thing
HELD_OUT_SYNSETS = 500
HELD_OUT_CITIES = 150

_NOUN_QUESTIONS = ("What is {a} {word}?", "what is {a} {word}", "What's {a} {word}?", "Do you know what {a} {word} is?")
_QUESTIONS = (
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
_SYSTEMS = (
    "You are a pocket dictionary.",
    "You are a helpful assistant.",
    "You are a dictionary that can use tools.",
    "Answer briefly.",
    "Be helpful and short.",
)
_REPEATS = (
    "Repeat: {}",
    'Repeat "{}".',
    'Say "{}".',
    "Say after me: {}",
    "Echo: {}",
    'Please repeat "{}"',
    "Copy this: {}",
)
_UNKNOWN = "I do not know the word {}."
_NO_TOOL = "I have no tool for that."


@dataclass(frozen=True)
class Example:
    """One document: a dialogue, or plain text."""

    kind: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Schema] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Recipe:
    """Words and cities, for training and held out, and what to say about them."""

    seed: int
    entries: list[Entry]
    held_out: list[Entry]
    pools: Pools
    held_out_pools: Pools

    def _rng(self, kind: str, number: int) -> random.Random:
        return random.Random(f"{self.seed} {kind} {number}")

    def line(self, number: int) -> Example:
        """A dictionary entry as plain text."""
        return Example("line", text=self.entries[number % len(self.entries)].line)

    def definition(self, number: int) -> Example:
        """One question about a word; as many numbers as there are entries ask for every word once."""
        rng = self._rng("definition", number)
        return Example("definition", _opened(rng, 0.25) + _defined(rng, self.entries[number % len(self.entries)]))

    def chat(self, number: int) -> Example:
        """A few questions about words in a row, now and then about one that does not exist."""
        rng = self._rng("chat", number)
        messages = _opened(rng, 0.25)
        for _ in range(rng.randint(1, 4)):
            messages += self._word(rng)
        return Example("chat", messages)

    def tool_dialogue(self, number: int) -> Example:
        """A dialogue with tools on offer, most of whose questions need one of them."""
        rng = self._rng("tool", number)
        offered = _offer(rng, self.pools)
        messages = _opened(rng, 0.2)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            choice = rng.random()
            if choice < 0.77:
                messages += _called(_uses(rng, self.pools, offered))
            elif choice < 0.85:
                messages += self._word(rng)
            elif choice < 0.9:
                messages += _repeated(rng, self.pools)
            else:
                messages += _exchange(_unanswerable(rng, self.pools, offered), _NO_TOOL)
        return Example("tool", messages, [tool.schema(rng) for tool in offered])

    def call(self, number: int, written: bool, phrasing: bool = True) -> Example:
        """One question in held-out words, or at least about held-out values, that needs a tool written or made up."""
        rng = self._rng(f"held-out {written} {phrasing}", number)
        pools = self.held_out_pools if phrasing else replace(self.held_out_pools, held_out=False)
        wanted = rng.choice(WRITTEN) if written else generated_tools.tool(rng, pools)
        offered = [wanted, *(tool for tool in _offer(rng, pools) if tool.name != wanted.name)]
        use = wanted.use(rng, pools)
        messages = _called((use.question, [use]))
        rng.shuffle(offered)
        return Example("tool", messages, [tool.schema(rng) for tool in offered])

    def without_tools(self, number: int) -> Example:
        """A question that needs a tool when there is none."""
        rng = self._rng("without tools", number)
        question = rng.choice(WRITTEN).use(rng, self.pools).question
        return Example("chat", _opened(rng, 0.25) + _exchange(question, _NO_TOOL))

    def _word(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.08:
            word = self.pools.made_up(rng)
            return _exchange(_question(rng, word, "noun"), _UNKNOWN.format(word))
        return _defined(rng, rng.choice(self.entries))


def read(folder: Path, seed: int) -> Recipe:
    """The recipe for a seed, from WordNet's folder.

    Raises:
        SystemExit: it is not there.
    """
    if not (folder / "data.noun").is_file():
        raise SystemExit(f"{folder} has no data.noun: `apt-get download wordnet-base && dpkg -x wordnet-base*.deb .`")
    rng = random.Random(f"{seed} split")
    found = wordnet.entries(folder)
    others = sorted((e for e in found if not e.everyday), key=lambda e: (-e.count, e.word))
    chosen = [e for e in found if e.everyday] + others[:FREQUENT_WORDS]
    hidden = set(rng.sample(sorted({e.synset for e in chosen}), HELD_OUT_SYNSETS))
    entries = sorted((e for e in chosen if e.synset not in hidden), key=lambda e: e.word)
    cities = wordnet.cities(folder)
    rng.shuffle(cities)
    words = [e.word for e in others[:FREQUENT_WORDS] if e.part == "noun"]
    return Recipe(
        seed,
        entries,
        [e for e in chosen if e.synset in hidden],
        Pools(sorted(cities[HELD_OUT_CITIES:]), words),
        Pools(sorted(cities[:HELD_OUT_CITIES]), words, held_out=True),
    )


def asked(entry: Entry) -> list[Message]:
    """The plainest question about a word with its answer."""
    return _exchange(f"What does {entry.word} mean?", entry.line)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _opened(rng: random.Random, share: float) -> list[Message]:
    return [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < share else []


def _question(rng: random.Random, word: str, part: str) -> str:
    forms = _NOUN_QUESTIONS if part == "noun" and rng.random() < 0.4 else _QUESTIONS
    article = "an" if word[0] in "aeiou" else "a"
    return rng.choice(forms).format(word=word, Word=word.capitalize(), a=article)


def _defined(rng: random.Random, entry: Entry) -> list[Message]:
    return _exchange(_question(rng, entry.word, entry.part), entry.line)


def _offer(rng: random.Random, pools: Pools) -> list[Tool]:
    """One to eight tools with different names, now and then similar ones."""
    count = min(rng.randint(1, 5), rng.randint(1, 8))
    written = sum(rng.random() < 0.6 for _ in range(count))
    if rng.random() < 0.4:
        start = rng.randrange(len(WRITTEN) - written)
        offered = list(WRITTEN[start : start + written])
    else:
        offered = rng.sample(WRITTEN, written)
    thing = generated_tools.some_thing(rng, pools) if rng.random() < 0.3 else ""
    offered += [generated_tools.tool(rng, pools, thing) for _ in range(count - written)]
    rng.shuffle(offered)
    return list({tool.name: tool for tool in offered}.values())


def _unanswerable(rng: random.Random, pools: Pools, offered: list[Tool]) -> str:
    """A question for a tool that is not on offer."""
    names = {tool.name for tool in offered}
    if rng.random() < 0.25:
        return generated_tools.tool(rng, pools).use(rng, pools).question
    return rng.choice([tool for tool in WRITTEN if tool.name not in names]).use(rng, pools).question


def _repeated(rng: random.Random, pools: Pools) -> list[Message]:
    """Something to say again."""
    text = rng.choice((Pools.sentence, Pools.code, Pools.title, Pools.made_up))(pools, rng)
    return _exchange(rng.choice(_REPEATS).format(text), text)


def _uses(rng: random.Random, pools: Pools, offered: list[Tool]) -> tuple[str, list[Use]]:
    """A question, with one use of a tool that it needs, or two."""
    first = rng.choice(offered)
    if first.both and rng.random() < 0.15:
        ask = f"{{{first.needed[0]}}}"
        pair = [first.use(rng, pools, ask), first.use(rng, pools, ask)]
        return rng.choice(first.both).format(*(use.question for use in pair)), pair
    uses = [first.use(rng, pools)]
    if rng.random() < 0.12:
        uses.append(rng.choice(offered).use(rng, pools))
    return rng.choice((" ", " And ", " Also: ")).join(use.question for use in uses), uses


def _called(question_and_uses: tuple[str, list[Use]]) -> list[Message]:
    question, uses = question_and_uses
    calls = [{"type": "function", "function": {"name": u.tool.name, "arguments": u.arguments}} for u in uses]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": use.result} for use in uses),
        {"role": "assistant", "content": " ".join(use.answer for use in uses)},
    ]
