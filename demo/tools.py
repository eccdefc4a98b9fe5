"""Tools to talk about: twelve written by hand, and any number made up.

A ``Tool`` can describe itself as a JSON schema, and make a ``Use`` of itself: what a person asks, the arguments of the
call that answers it, what the tool returns, and the sentence that tells it. The words of a question name its arguments:
"What is the weather in {city}?" makes a call with ``city`` alone. Every value is drawn at random, so that it must be
copied from the question or from the result and cannot be known.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
Schema = dict[str, Any]

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
        return " ".join(
            rng.choice(self.words) if rng.random() < 0.85 else self.made_up(rng) for _ in range(rng.randint(1, most))
        )

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


Fill = Callable[[random.Random, Pools], Any]


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
        ask = ask or rng.choice(self.held_out_asks if pools.held_out and self.held_out_asks else self.asks)
        order = re.findall(r"{(\w+)}", ask)
        values = {name: self.fills[name](rng, pools) for name in order}
        arguments = {name: values[name] for name in self.parameters if name in values}
        question = ask.format(**{name: spoken(value) for name, value in values.items()})
        if rng.random() < 0.15:
            result: Values = {"error": rng.choice(("not found", "no connection", "not allowed", "try again later"))}
            return Use(self, question, arguments, result, f"That did not work: {result['error']}.")
        result = self.returns(rng, pools, arguments)
        told = {name: spoken(value) for name, value in (arguments | result).items()}
        answer = self.answer.format(**told) if self.answer else _told(result)
        return Use(self, question, arguments, result, answer)


def spoken(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)


def _told(result: Values) -> str:
    told = [f"the {name.replace('_', ' ')} is {spoken(value)}" for name, value in result.items()]
    sentence = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _whole(description: str) -> Schema:
    return {"type": "integer", "description": description}


def _real(description: str) -> Schema:
    return {"type": "number", "description": description}


def _any_number(rng: random.Random, pools: Pools) -> float:
    return pools.number(rng) if rng.random() < 0.6 else pools.decimal(rng)


def _unit(rng: random.Random, pools: Pools) -> str:
    return rng.choice(("celsius", "fahrenheit"))


WRITTEN = (
    Tool(
        "get_weather",
        "The weather in a city.",
        {
            "city": _text("Name of the city"),
            "unit": _text("Unit of the temperature", enum=["celsius", "fahrenheit"]),
        },
        {"city": lambda rng, pools: pools.city(rng), "unit": _unit},
        lambda rng, pools, values: {"temperature": rng.randint(-25, 99), "sky": rng.choice(SKIES)},
        "It is {temperature} degrees and {sky} in {city}.",
        (
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city} today?",
            "Tell me the weather in {city}.",
            "weather in {city}",
            "Weather in {city}, please.",
            "Is it cold in {city}?",
            "How warm is it in {city}?",
            "Get the weather for {city}.",
            "Will I need a coat in {city}?",
            "I am going to {city}. What is the weather there?",
            "What is the weather in {city} in {unit}?",
            "How warm is it in {city} in {unit}?",
            "Give me the temperature in {city} in {unit}.",
        ),
        (
            "Can you check the weather in {city}?",
            "How cold is it in {city} right now?",
            "Do I need an umbrella in {city}?",
            "Show me the weather for {city} in {unit}.",
        ),
        ("city",),
        ("What is the weather in {} and {}?", "How is the weather in {} and in {}?", "Weather in {} and {}?"),
    ),
    Tool(
        "get_time",
        "The local time in a city.",
        {"city": _text("Name of the city")},
        {"city": lambda rng, pools: pools.city(rng)},
        lambda rng, pools, values: {"time": pools.clock(rng)},
        "It is {time} in {city}.",
        (
            "What time is it in {city}?",
            "What is the time in {city}?",
            "Tell me the time in {city}.",
            "time in {city}",
            "Is it late in {city}?",
            "What does the clock say in {city}?",
            "I want to call someone in {city}. What time is it there?",
        ),
        ("What time do they have in {city}?", "Can you tell me what time it is in {city} now?"),
        ("city",),
        ("What time is it in {} and in {}?", "Tell me the time in {} and {}."),
    ),
    Tool(
        "convert_currency",
        "Change an amount of money into another currency.",
        {
            "amount": _real("How much money"),
            "from_currency": _text("Code of the currency to change"),
            "to_currency": _text("Code of the currency to get"),
        },
        {
            "amount": _any_number,
            "from_currency": lambda rng, pools: rng.choice(CURRENCIES),
            "to_currency": lambda rng, pools: rng.choice(CURRENCIES),
        },
        lambda rng, pools, values: {"amount_after": pools.decimal(rng)},
        "{amount} {from_currency} is {amount_after} {to_currency}.",
        (
            "Convert {amount} {from_currency} to {to_currency}.",
            "How much is {amount} {from_currency} in {to_currency}?",
            "What is {amount} {from_currency} in {to_currency}?",
            "{amount} {from_currency} to {to_currency}",
            "I have {amount} {from_currency}. How many {to_currency} is that?",
            "How many {to_currency} do I get for {amount} {from_currency}?",
        ),
        (
            "Change {amount} {from_currency} into {to_currency}, please.",
            "What are {amount} {from_currency} worth in {to_currency}?",
        ),
        ("amount", "from_currency", "to_currency"),
    ),
    Tool(
        "add",
        "Add two numbers.",
        {"a": _real("First number"), "b": _real("Second number")},
        {"a": _any_number, "b": _any_number},
        lambda rng, pools, values: {"sum": round(values["a"] + values["b"], 2)},
        "{a} plus {b} is {sum}.",
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "{a} + {b}",
            "How much is {a} + {b}?",
            "Sum up {a} and {b}.",
            "What do {a} and {b} make together?",
        ),
        ("Can you add {a} to {b}?", "What is the sum of {a} and {b}?"),
        ("a", "b"),
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        {"minutes": _whole("How long"), "label": _text("What the timer is for")},
        {"minutes": lambda rng, pools: rng.randint(1, 180), "label": lambda rng, pools: pools.phrase(rng, 3)},
        lambda rng, pools, values: {"ends_at": pools.clock(rng)},
        "The timer ends at {ends_at}.",
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Set a timer for {minutes} minutes called {label}.",
            "Start a timer named {label}, {minutes} minutes.",
            "Timer: {minutes} minutes, {label}.",
            "Wake me in {minutes} minutes.",
        ),
        ("I need a timer for {minutes} minutes.", 'Set a timer "{label}" that runs {minutes} minutes.'),
        ("minutes",),
    ),
    Tool(
        "translate",
        "Translate a text.",
        {"text": _text("What to translate"), "language": _text("Language to translate into")},
        {"text": lambda rng, pools: pools.phrase(rng), "language": lambda rng, pools: rng.choice(LANGUAGES)},
        lambda rng, pools, values: {"translation": " ".join(pools.made_up(rng) for _ in values["text"].split())},
        'In {language} that is "{translation}".',
        (
            "Translate {text} into {language}.",
            'Translate "{text}" to {language}.',
            'How do you say "{text}" in {language}?',
            "What is {text} in {language}?",
            'Say "{text}" in {language}.',
            "Give me the {language} for {text}.",
        ),
        ('Please put "{text}" into {language}.', 'What would "{text}" be in {language}?'),
        ("text", "language"),
    ),
    Tool(
        "play_music",
        "Play a song.",
        {"title": _text("Title of the song"), "artist": _text("Who plays it")},
        {"title": lambda rng, pools: pools.title(rng), "artist": lambda rng, pools: pools.person(rng)},
        lambda rng, pools, values: {"room": rng.choice(("kitchen", "bedroom", "garden", "hall", "office"))},
        "Now playing {title} in the {room}.",
        (
            "Play {title}.",
            "Play {title} by {artist}.",
            "I want to hear {title}.",
            "I want to hear {title} by {artist}.",
            "Put on {title} by {artist}, please.",
            "Could you play the song {title}?",
        ),
        ("Let me listen to {title} by {artist}.", "Please play {title} for me."),
        ("title",),
    ),
    Tool(
        "send_message",
        "Send someone a message.",
        {"recipient": _text("Who gets it"), "text": _text("What it says")},
        {"recipient": lambda rng, pools: pools.person(rng), "text": lambda rng, pools: pools.phrase(rng, 7)},
        lambda rng, pools, values: {"sent_at": pools.clock(rng)},
        "The message to {recipient} went out at {sent_at}.",
        (
            "Send {recipient} the message: {text}",
            'Send "{text}" to {recipient}.',
            'Write to {recipient}: "{text}".',
            'Tell {recipient} "{text}".',
            "Message {recipient}: {text}",
            'Text {recipient} that "{text}".',
        ),
        ('Let {recipient} know: "{text}".', 'Please send {recipient} a message saying "{text}".'),
        ("recipient", "text"),
    ),
    Tool(
        "search_flights",
        "Find flights between two cities.",
        {"origin": _text("Where from"), "destination": _text("Where to"), "date": _text("Which day")},
        {
            "origin": lambda rng, pools: pools.city(rng),
            "destination": lambda rng, pools: pools.city(rng),
            "date": lambda rng, pools: pools.date(rng),
        },
        lambda rng, pools, values: {
            "flight": f"{rng.choice('ABKLS')}{rng.choice('AFKQY')}{pools.number(rng)}",
            "price": pools.number(rng),
        },
        "Flight {flight} from {origin} to {destination} costs {price}.",
        (
            "Find flights from {origin} to {destination} on {date}.",
            "Search flights from {origin} to {destination}, {date}.",
            "I want to fly from {origin} to {destination} on {date}.",
            "Flights to {destination} from {origin} on {date}?",
            "On {date} I fly from {origin} to {destination}. What flights are there?",
            "Are there flights from {origin} to {destination} on {date}?",
        ),
        (
            "Which flights go from {origin} to {destination} on {date}?",
            "Get me from {origin} to {destination} by plane on {date}.",
        ),
        ("origin", "destination", "date"),
    ),
    Tool(
        "get_stock_price",
        "The price of a share.",
        {"symbol": _text("Symbol of the share")},
        {
            "symbol": lambda rng, pools: "".join(
                rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4))
            )
        },
        lambda rng, pools, values: {"price": pools.decimal(rng), "currency": rng.choice(CURRENCIES)},
        "{symbol} is at {price} {currency}.",
        (
            "What is the price of {symbol}?",
            "How is {symbol} doing?",
            "Stock price of {symbol}?",
            "Get the share price of {symbol}.",
            "How much is one share of {symbol}?",
        ),
        ("What does a share of {symbol} cost?", "Look up the stock {symbol}."),
        ("symbol",),
    ),
    Tool(
        "book_table",
        "Book a table at a restaurant.",
        {
            "restaurant": _text("Name of the restaurant"),
            "people": _whole("How many guests"),
            "time": _text("Time of day"),
        },
        {
            "restaurant": lambda rng, pools: pools.title(rng),
            "people": lambda rng, pools: rng.randint(1, 20),
            "time": lambda rng, pools: pools.clock(rng),
        },
        lambda rng, pools, values: {"table": rng.randint(1, 99)},
        "Table {table} at {restaurant} is yours at {time}.",
        (
            "Book a table at {restaurant} for {people} at {time}.",
            "Book a table for {people} at {restaurant}, {time}.",
            "Reserve a table for {people} people at {time} at {restaurant}.",
            "We are {people} and want to eat at {restaurant} at {time}.",
            "I need a table at {restaurant} at {time} for {people} people.",
        ),
        (
            "Can we get a table for {people} at {restaurant} at {time}?",
            "Please reserve {restaurant} for {people} guests at {time}.",
        ),
        ("restaurant", "people", "time"),
    ),
    Tool(
        "find_rhymes",
        "Words that rhyme with a word.",
        {"word": _text("The word"), "count": _whole("How many rhymes")},
        {"word": lambda rng, pools: pools.phrase(rng, 1), "count": lambda rng, pools: rng.randint(1, 12)},
        lambda rng, pools, values: {"rhymes": [pools.made_up(rng) for _ in range(rng.randint(1, 3))]},
        "These rhyme with {word}: {rhymes}.",
        (
            "What rhymes with {word}?",
            "Find rhymes for {word}.",
            "Give me {count} rhymes for {word}.",
            "Which words rhyme with {word}?",
            "Find {count} words that rhyme with {word}.",
        ),
        ("I need a rhyme for {word}.", "Tell me {count} rhymes of {word}."),
        ("word",),
    ),
)

_ACTIONS = [
    "create",
    "update",
    "fetch",
    "open",
    "set",
    "remove",
    "check",
    "start",
    "stop",
    "find",
    "send",
    "order",
    "save",
    "load",
    "move",
    "rename",
    "count",
    "rate",
]
_PARAMETERS = [
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
]


def made_up(rng: random.Random, pools: Pools) -> Tool:
    """A tool with a name, parameters and results of its own."""
    action = rng.choice(_ACTIONS)
    thing = pools.made_up(rng) if rng.random() < 0.3 else rng.choice(pools.words)
    name = f"{action}_{thing}" if rng.random() < 0.85 else pools.made_up(rng)
    names = rng.sample(_PARAMETERS, rng.randint(1, 3))
    if rng.random() < 0.4:
        names = list(dict.fromkeys([rng.choice(pools.words), *names[1:]]))
    parameters, fills = {}, {}
    for parameter in names:
        parameters[parameter], fills[parameter] = _parameter(rng, pools)
    results = rng.sample([*_PARAMETERS, rng.choice(pools.words)], rng.randint(1, 2))
    return Tool(
        name,
        f"{action.capitalize()} the {thing}." if rng.random() < 0.8 else f"{pools.phrase(rng).capitalize()}.",
        parameters,
        fills,
        lambda rng, pools, values: {result: _any_value(rng, pools) for result in results},
        "",
        *_asks(rng, name, action, thing, names),
        tuple(names),
    )


def _parameter(rng: random.Random, pools: Pools) -> tuple[Schema, Fill]:
    kind = rng.choice(("string", "string", "string", "integer", "number", "boolean", "enum", "array"))
    if kind == "string":
        draw = rng.choice((Pools.phrase, Pools.title, Pools.person, Pools.made_up, Pools.date, Pools.clock, Pools.city))
        return {"type": "string"}, lambda rng, pools: draw(pools, rng)
    if kind == "integer":
        return {"type": "integer"}, lambda rng, pools: pools.number(rng)
    if kind == "number":
        return {"type": "number"}, _any_number
    if kind == "boolean":
        return {"type": "boolean"}, lambda rng, pools: rng.random() < 0.5
    if kind == "enum":
        choices = sorted({rng.choice(pools.words) for _ in range(rng.randint(2, 4))})
        return {"type": "string", "enum": choices}, lambda rng, pools: rng.choice(choices)
    return {"type": "array", "items": {"type": "string"}}, lambda rng, pools: [
        pools.phrase(rng, 1) for _ in range(rng.randint(1, 4))
    ]


def _any_value(rng: random.Random, pools: Pools) -> Any:
    draw = rng.choice((Pools.phrase, Pools.made_up, Pools.number, Pools.number, Pools.decimal, Pools.clock))
    return draw(pools, rng)


def _asks(
    rng: random.Random, name: str, action: str, thing: str, parameters: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ways to ask for a made-up tool: those for training, and those held out."""
    given = rng.sample(parameters, len(parameters))

    def listed(form: str, comma: str = ", ", last: str = " and ") -> str:
        parts = [form.format(name=parameter, value=f"{{{parameter}}}") for parameter in given]
        return parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + last + parts[-1]

    asks = [
        f"Call {name} with {listed('{name} = {value}')}.",
        f"Call {name} with {listed('{name} {value}')}.",
        f"Use {name}: {listed('{name} {value}', last=', ')}.",
        f"Run {name} with {listed('{name} set to {value}')}.",
        f"{name}({listed('{name}={value}', last=', ')})",
    ]
    held_out = [f"Please call {name}, {listed('{name} is {value}')}."]
    if name == f"{action}_{thing}":
        act = f"{action.capitalize()} the {thing}"
        asks += [
            f"{act} with {listed('{name} {value}')}.",
            f"{act}, {listed('{name}: {value}', last=', ')}.",
            f"Please {action} the {thing} with {listed('the {name} {value}')}.",
            f"I want to {action} the {thing}: {listed('{name} {value}')}.",
        ]
        held_out.append(f"Can you {action} the {thing} with {listed('{name} {value}')}?")
    return tuple(asks), tuple(held_out)
