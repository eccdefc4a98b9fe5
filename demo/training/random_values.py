"""Random values for questions and results: cities, names, numbers, words of a dictionary and pseudowords."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

CURRENCIES = [
    "USD",
    "EUR",
    "GBP",
    "JPY",
    "CHF",
    "SEK",
    "NOK",
    "DKK",
    "CAD",
    "AUD",
    "NZD",
    "INR",
    "BRL",
    "ZAR",
    "MXN",
    "PLN",
    "CZK",
    "TRY",
    "KRW",
    "CNY",
]
LANGUAGES = [
    "French",
    "German",
    "Spanish",
    "Italian",
    "Norwegian",
    "Swedish",
    "Danish",
    "Dutch",
    "Polish",
    "Finnish",
    "Greek",
    "Turkish",
]
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy", "overcast", "misty"]
FIRST_NAMES = [
    "Ann",
    "Bob",
    "Carl",
    "Dora",
    "Eva",
    "Frank",
    "Greta",
    "Hans",
    "Ida",
    "Jan",
    "Kari",
    "Liam",
    "Maya",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Sven",
    "Tina",
    "Uma",
    "Vera",
    "Will",
    "Yara",
    "Zoe",
    "Ada",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olive",
    "Peter",
    "Ruth",
    "Sam",
    "Tom",
    "Victor",
    "Wendy",
]
DAYS = ["today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PARAMETER_NAMES = [
    "id",
    "name",
    "title",
    "owner",
    "path",
    "color",
    "size",
    "level",
    "limit",
    "tag",
    "note",
    "status",
    "target",
    "source",
    "group",
    "code",
    "label",
    "key",
    "mode",
    "type",
    "date",
    "user",
    "place",
    "reason",
    "count",
    "price",
    "weight",
    "format",
    "city",
    "text",
]
_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "kr",
    "pl",
    "pr",
    "sh",
    "sk",
    "sl",
    "st",
    "th",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ei", "io", "oo", "ou"]
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "x", "ck", "nd", "rk", "st"]


@dataclass(frozen=True)
class ValueSampler:
    """Draws values from lists of cities and words, and generates the others.

    Attributes:
        cities (Sequence[str]): The cities to draw from.
        words (Sequence[str]): The dictionary words to draw from.
        held_out_phrasings (bool): Makes tools use phrasings that training never uses. Default: ``False``.
    """

    cities: Sequence[str]
    words: Sequence[str]
    held_out_phrasings: bool = False

    def pseudoword(self, rng: random.Random, syllables: int = 0) -> str:
        """Return a pronounceable word of random syllables, by default two or three."""
        count = syllables or rng.randint(2, 3)
        return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))

    def city(self, rng: random.Random) -> str:
        """Return a city, or sometimes a pseudoword; with held-out phrasings always a city."""
        if self.held_out_phrasings or rng.random() < 0.7:
            return rng.choice(self.cities)
        return self.pseudoword(rng).capitalize()

    def person(self, rng: random.Random) -> str:
        """Return a first name, sometimes with a surname; either may be a pseudoword."""
        first = rng.choice(FIRST_NAMES) if rng.random() < 0.6 else self.pseudoword(rng, 2).capitalize()
        return first if rng.random() < 0.6 else f"{first} {self.pseudoword(rng, 2).capitalize()}"

    def phrase(self, rng: random.Random, max_words: int = 5) -> str:
        """Return one or more unrelated words."""
        return " ".join(self.word(rng) for _ in range(rng.randint(1, max_words)))

    def word(self, rng: random.Random) -> str:
        """Return a dictionary word, a pseudoword, or a word that is a parameter's name in other tools."""
        draw = rng.random()
        if draw < 0.65:
            return rng.choice(self.words)
        return self.pseudoword(rng, rng.randint(1, 4)) if draw < 0.92 else rng.choice(PARAMETER_NAMES)

    def label(self, rng: random.Random) -> str:
        """Return one to three words."""
        return self.phrase(rng, 3)

    def sentence(self, rng: random.Random) -> str:
        """Return one to nine words."""
        return self.phrase(rng, 9)

    def code(self, rng: random.Random) -> str:
        """Return letters and digits as in an order number or a file name."""
        parts = [
            str(self.integer(rng)) if rng.random() < 0.5 else self.pseudoword(rng, 1) for _ in range(rng.randint(1, 3))
        ]
        code = rng.choice("-_./").join(parts)
        return code.upper() if rng.random() < 0.3 else f"{rng.choice('abcxyz')}{code}"

    def symbol(self, rng: random.Random) -> str:
        """Return two to four capital letters."""
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))

    def currency(self, rng: random.Random) -> str:
        """Return the code of a currency."""
        return rng.choice(CURRENCIES)

    def language(self, rng: random.Random) -> str:
        """Return the name of a language."""
        return rng.choice(LANGUAGES)

    def small_integer(self, rng: random.Random) -> int:
        """Return an integer from 1 to 20."""
        return rng.randint(1, 20)

    def amount(self, rng: random.Random) -> float:
        """Return an integer or a decimal number."""
        return self.integer(rng) if rng.random() < 0.6 else self.decimal(rng)

    def word_list(self, rng: random.Random) -> list[str]:
        """Return a list of one to four words."""
        return [self.word(rng) for _ in range(rng.randint(1, 4))]

    def title(self, rng: random.Random) -> str:
        """Return a capitalized name as of a song or a restaurant."""
        name = " ".join(word.capitalize() for word in self.phrase(rng, 2).split())
        return f"The {name}" if rng.random() < 0.3 else name

    def integer(self, rng: random.Random) -> int:
        """Return a positive integer of one to four digits."""
        return rng.randrange(1, 10 ** rng.randint(1, 4))

    def decimal(self, rng: random.Random) -> float:
        """Return a number with one or two digits after the decimal point."""
        return round(rng.uniform(1, 10 ** rng.randint(1, 4)), rng.randint(1, 2))

    def time_of_day(self, rng: random.Random) -> str:
        """Return a time as ``HH:MM``."""
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}"

    def date(self, rng: random.Random) -> str:
        """Return a day as ``YYYY-MM-DD`` or by its name."""
        if rng.random() < 0.4:
            return rng.choice(DAYS)
        return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
