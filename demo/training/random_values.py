"""Values to talk about, drawn at random."""

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
PARAMETERS = [
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
class Pools:
    """What values are drawn from."""

    cities: Sequence[str]
    words: Sequence[str]
    held_out: bool = False  # whether questions are put in the words that training never uses

    def made_up(self, rng: random.Random, syllables: int = 0) -> str:
        """A word that nobody has read before."""
        count = syllables or rng.randint(2, 3)
        return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))

    def city(self, rng: random.Random) -> str:
        """A city, now and then one that does not exist."""
        return rng.choice(self.cities) if self.held_out or rng.random() < 0.7 else self.made_up(rng).capitalize()

    def person(self, rng: random.Random) -> str:
        """A first name, now and then with a surname, now and then made up."""
        first = rng.choice(FIRST_NAMES) if rng.random() < 0.6 else self.made_up(rng, 2).capitalize()
        return first if rng.random() < 0.6 else f"{first} {self.made_up(rng, 2).capitalize()}"

    def phrase(self, rng: random.Random, most: int = 5) -> str:
        """A few words in a row."""
        return " ".join(self.word(rng) for _ in range(rng.randint(1, most)))

    def word(self, rng: random.Random) -> str:
        """One word: of the dictionary, made up, or one that names parameters elsewhere."""
        draw = rng.random()
        if draw < 0.65:
            return rng.choice(self.words)
        return self.made_up(rng, rng.randint(1, 4)) if draw < 0.92 else rng.choice(PARAMETERS)

    def label(self, rng: random.Random) -> str:
        """One to three words."""
        return self.phrase(rng, 3)

    def sentence(self, rng: random.Random) -> str:
        """One to nine words."""
        return self.phrase(rng, 9)

    def code(self, rng: random.Random) -> str:
        """Letters and digits such as an order or a file has."""
        parts = [
            str(self.number(rng)) if rng.random() < 0.5 else self.made_up(rng, 1) for _ in range(rng.randint(1, 3))
        ]
        code = rng.choice("-_./").join(parts)
        return code.upper() if rng.random() < 0.3 else f"{rng.choice('abcxyz')}{code}"

    def symbol(self, rng: random.Random) -> str:
        """Two to four capitals."""
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))

    def currency(self, rng: random.Random) -> str:
        """The code of a currency."""
        return rng.choice(CURRENCIES)

    def language(self, rng: random.Random) -> str:
        """The name of a language."""
        return rng.choice(LANGUAGES)

    def few(self, rng: random.Random) -> int:
        """A small whole number."""
        return rng.randint(1, 20)

    def amount(self, rng: random.Random) -> float:
        """Any number."""
        return self.number(rng) if rng.random() < 0.6 else self.decimal(rng)

    def several(self, rng: random.Random) -> list[str]:
        """A few words, each on its own."""
        return [self.word(rng) for _ in range(rng.randint(1, 4))]

    def title(self, rng: random.Random) -> str:
        """A name such as a song or a restaurant has."""
        name = " ".join(word.capitalize() for word in self.phrase(rng, 2).split())
        return f"The {name}" if rng.random() < 0.3 else name

    def number(self, rng: random.Random) -> int:
        """A whole number of one to four digits."""
        return rng.randrange(1, 10 ** rng.randint(1, 4))

    def decimal(self, rng: random.Random) -> float:
        """A number with one or two digits after the point."""
        return round(rng.uniform(1, 10 ** rng.randint(1, 4)), rng.randint(1, 2))

    def clock(self, rng: random.Random) -> str:
        """A time of day."""
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}"

    def date(self, rng: random.Random) -> str:
        """A day by its date or its name."""
        if rng.random() < 0.4:
            return rng.choice(DAYS)
        return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
