"""Tools to talk about: some written by hand, and any number made up.

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

from demo.pools import CURRENCIES, PARAMETERS, SKIES, Pools

Values = dict[str, Any]
Schema = dict[str, Any]

_OPENINGS = (
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
_REQUESTS = (
    "Please ",
    "please ",
    "Could you ",
    "Could you please ",
    "Would you ",
    "Would you kindly ",
    "Will you ",
    "Can you ",
    "Can you please ",
    "Can we ",
    "I would like to ",
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
        opening = rng.choice(_OPENINGS + _REQUESTS if ask.endswith(".") and not _NO_ORDER.match(ask) else _OPENINGS)
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


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _whole(description: str) -> Schema:
    return {"type": "integer", "description": description}


def _real(description: str) -> Schema:
    return {"type": "number", "description": description}


def _celsius(pools: Pools, rng: random.Random) -> str:
    return rng.choice(("celsius", "fahrenheit"))


def _one_of(*choices: str) -> Fill:
    return lambda pools, rng: rng.choice(choices)


def _between(least: int, most: int) -> Fill:
    return lambda pools, rng: rng.randint(least, most)


ROOMS = ("kitchen", "bedroom", "garden", "hall", "office", "bathroom", "garage", "cellar")

WRITTEN = (  # similar ones side by side
    Tool(
        "get_weather",
        "The weather in a city.",
        {
            "city": _text("Name of the city"),
            "unit": _text("Unit of the temperature", enum=["celsius", "fahrenheit"]),
        },
        {"city": Pools.city, "unit": _celsius},
        lambda rng, pools, values: {"temperature": rng.randint(-25, 99), "sky": rng.choice(SKIES)},
        "It is {temperature} degrees and {sky} in {city}.",
        (
            "[What is|What's|How is|How's] the weather [|like |now |today ]in {city}[|today|right now]?",
            "[Tell me|Give me|Find out|I want to know|Look up|Get] the [weather|temperature|forecast] [in|for] {city}.",
            "[weather|Weather|Current weather|Temperature|weather report|The weather] [in|for] {city}",
            "[Is it|Is it going to be|Will it be] [cold|warm|hot|sunny|rainy|windy|freezing|snowing|nice] in {city}?",
            "How [warm|hot|sunny|windy|wet] is it [|right now |today ]in {city}?",
            "[Will|Do|Should] I [take|bring|wear|need|pack] a [coat|hat|jacket|raincoat|scarf] [in|for] {city}?",
            "[Should I take an umbrella to|Is it raining in|Does it rain in|Will it rain in] {city}?",
            "I am [going|travelling|flying] to {city}. [What is the weather|How warm is it|Does it rain] there?",
            "[In|For] {city}, [what is the weather|how warm is it|is it cold]?",
            "{city}: [what is the weather|weather|how warm is it]?",
            "[What is|Tell me|Give me|Get] the [weather|temperature] [in|for] {city} in {unit}.",
            "How [warm|hot] is it in {city}[| today] in [|degrees ]{unit}?",
            "[Use|In|With] {unit}: [what is the weather in|how warm is it in|the temperature in] {city}?",
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
        {"city": Pools.city},
        lambda rng, pools, values: {"time": pools.clock(rng)},
        "It is {time} in {city}.",
        (
            "[What time is it|What is the time|What's the time|What is the local time] [|now |right now ]in {city}?",
            "[Tell me|Give me|Get|Find out|Look up|I want to know] the [time|local time|hour] in {city}.",
            "[time|Time|Local time|The time|Clock|current time] [in|for] {city}",
            "Is it [late|early|night|morning|noon|already evening] in {city}?",
            "What does the clock [say|show] in {city}?",
            "How late is it in {city}?",
            "I want to [call|ring|phone|meet] someone in {city}. What time is it there?",
            "[In|For] {city}, what [time is it|is the time]?",
            "{city}: [what time is it|local time|time]?",
            "Which hour is it in {city}?",
        ),
        (
            "What time do they have in {city}?",
            "Can you tell me what time it is in {city} now?",
            "What is the hour in {city}?",
        ),
        ("city",),
        ("What time is it in {} and in {}?", "Tell me the time in {} and {}."),
    ),
    Tool(
        "get_population",
        "How many people live in a city.",
        {"city": _text("Name of the city")},
        {"city": Pools.city},
        lambda rng, pools, values: {"population": pools.number(rng) * 1000},
        "{population} people live in {city}.",
        (
            "How many [people|inhabitants|citizens] [live in|are in|are there in|has] {city}?",
            "[What is|Tell me|Give me|Look up|Get|Find] the [population|number of inhabitants|size] of {city}.",
            "[Population|population|Inhabitants|Number of people] [of|in] {city}",
            "How [big|large|populous] is {city}?",
            "Is {city} a [big|small|large] [city|town]?",
            "{city}: [how many people live there|population|inhabitants]?",
            "[Count|Check] the [people|inhabitants] [in|of] {city}.",
        ),
        (
            "How many people does {city} have?",
            "Show me the population of {city}.",
            "Do many people live in {city}?",
        ),
        ("city",),
        ("How many people live in {} and in {}?",),
    ),
    Tool(
        "get_sunset",
        "When the sun sets in a city.",
        {"city": _text("Name of the city"), "date": _text("Which day")},
        {"city": Pools.city, "date": Pools.date},
        lambda rng, pools, values: {"sunset": pools.clock(rng)},
        "The sun sets at {sunset} in {city}.",
        (
            "[When|At what time|What time] [does|will] the sun [set|go down] in {city}?",
            "[What time is|When is|Tell me|Get|Give me|Look up] [|the ]sunset in {city}[| on {date}].",
            "[Sunset|sunset|Sundown] [in|for] {city}[|, {date}| on {date}]",
            "When does it [get|become] dark in {city}[| on {date}]?",
            "How long is it light in {city}[| on {date}]?",
            "On {date}, when does the sun [set|go down] in {city}?",
        ),
        (
            "Until when is the sun up in {city}?",
            "When will it be dark in {city} on {date}?",
            "Show me the sunset for {city}.",
        ),
        ("city",),
        ("When does the sun set in {} and {}?",),
    ),
    Tool(
        "convert_currency",
        "Change an amount of money into another currency.",
        {
            "amount": _real("How much money"),
            "from_currency": _text("Code of the currency to change"),
            "to_currency": _text("Code of the currency to get"),
        },
        {"amount": Pools.amount, "from_currency": Pools.currency, "to_currency": Pools.currency},
        lambda rng, pools, values: {"amount_after": pools.decimal(rng)},
        "{amount} {from_currency} is {amount_after} {to_currency}.",
        (
            "[Convert|Exchange|Turn|Swap] {amount} {from_currency} [to|into|for] {to_currency}.",
            "Change {amount} {from_currency} to {to_currency}.",
            "[How much|What] [is|are] {amount} {from_currency} [in|as] {to_currency}?",
            "How many {to_currency} [is|are] {amount} {from_currency}?",
            "{amount} {from_currency} [to|in|into|as|=] {to_currency}",
            "I have {amount} {from_currency}. [How many|How much in] {to_currency} is that?",
            "How [many|much] {to_currency} [do I get|will I get|can I buy] [for|with] {amount} {from_currency}?",
            "[What is|Tell me|Give me] [|the value of ]{amount} {from_currency} in {to_currency}.",
            "[Into|To] {to_currency}, [convert|change] {amount} {from_currency}.",
            "I [need|want] to [change|exchange|convert] {amount} {from_currency} [to|into] {to_currency}.",
        ),
        (
            "Change {amount} {from_currency} into {to_currency}, please.",
            "What are {amount} {from_currency} worth in {to_currency}?",
            "How much {to_currency} are {amount} {from_currency}?",
        ),
        ("amount", "from_currency", "to_currency"),
    ),
    Tool(
        "convert_length",
        "Change a length into another unit.",
        {"length": _real("Number"), "from_unit": _text("Unit to change"), "to_unit": _text("Unit to get")},
        {
            "length": Pools.amount,
            "from_unit": _one_of("meters", "feet", "miles", "inches"),
            "to_unit": _one_of("kilometers", "yards", "centimeters", "furlongs"),
        },
        lambda rng, pools, values: {"converted": pools.decimal(rng)},
        "{length} {from_unit} are {converted} {to_unit}.",
        (
            "[Convert|Turn|Change] {length} {from_unit} [to|into] {to_unit}.",
            "[How much is|What is|What are|How long are] {length} {from_unit} in {to_unit}?",
            "{length} {from_unit} [to|in|into|as] {to_unit}",
            "How many {to_unit} [are|is|are there in|make] {length} {from_unit}?",
            "[Give me|Tell me|Measure] {length} {from_unit} in {to_unit}.",
            "It is {length} {from_unit} long. How many {to_unit} is that?",
        ),
        (
            "What do {length} {from_unit} come to in {to_unit}?",
            "Can you express {length} {from_unit} in {to_unit}?",
            "I need {length} {from_unit} in {to_unit}.",
        ),
        ("length", "from_unit", "to_unit"),
    ),
    Tool(
        "add",
        "Add two numbers.",
        {"a": _real("First number"), "b": _real("Second number")},
        {"a": Pools.amount, "b": Pools.amount},
        lambda rng, pools, values: {"sum": round(values["a"] + values["b"], 2)},
        "{a} plus {b} is {sum}.",
        (
            "[What is|What's|How much is|Calculate|Compute|Tell me] {a} [plus|+|added to] {b}?",
            "[Add|Sum|Sum up|Add up|Total|Plus] {a} and {b}.",
            "[Add|Sum]: {a}, {b}",
            "{a} [+|plus|and] {b}[|=| =| is what?| make what?]",
            "What do {a} and {b} [make|give] together?",
            "What [is|would be] the [total|result] of {a} [and|plus] {b}?",
            "[Give me|Tell me|Calculate|Compute|Find] the [sum|total] of {a} and {b}.",
            "Add {b} to {a}.",
            "I have {a} and get {b} more. How many is that?",
            "[Put|Take] {a} and {b} together.",
        ),
        (
            "Can you add {a} to {b}?",
            "What is the sum of {a} and {b}?",
            "How much are {a} and {b} together?",
            "I need the sum of {a} and {b}.",
        ),
        ("a", "b"),
    ),
    Tool(
        "subtract",
        "Subtract one number from another.",
        {"a": _real("What to subtract from"), "b": _real("What to subtract")},
        {"a": Pools.amount, "b": Pools.amount},
        lambda rng, pools, values: {"difference": round(values["a"] - values["b"], 2)},
        "{a} minus {b} is {difference}.",
        (
            "[What is|What's|How much is|Calculate|Compute|Tell me] {a} [minus|-|less|without] {b}?",
            "[Subtract|Take|Take away|Deduct|Remove] {b} from {a}.",
            "{a} [-|minus|less] {b}[|=| =| is what?]",
            "[What|How much] is left of {a} [without|minus|less] {b}?",
            "[What|How much] is left if I take {b} from {a}?",
            "[Give me|Tell me|Calculate|Find] the difference [between|of] {a} and {b}.",
            "I have {a} and [give away|lose|spend] {b}. [How many|How much] is left?",
        ),
        (
            "What is the difference of {a} and {b}?",
            "Can you take {b} away from {a}?",
            "How much remains of {a} after {b}?",
        ),
        ("a", "b"),
    ),
    Tool(
        "multiply",
        "Multiply two numbers.",
        {"a": _real("First number"), "b": _real("Second number")},
        {"a": Pools.amount, "b": Pools.amount},
        lambda rng, pools, values: {"product": round(values["a"] * values["b"], 2)},
        "{a} times {b} is {product}.",
        (
            "[What is|What's|How much is|Calculate|Compute|Tell me] {a} [times|*|x|multiplied by] {b}?",
            "[Multiply|Times] {a} [by|and|with|times] {b}.",
            "{a} [*|x|times] {b}[|=| =| is what?]",
            "[Give me|Tell me|Calculate|Compute|Find] the product of {a} and {b}.",
            "What do {a} and {b} [make|give] multiplied?",
            "I have {a} boxes of {b}. How many is that?",
            "How [many|much] are {a} times {b}?",
        ),
        (
            "What is the product of {a} and {b}?",
            "Can you multiply {a} by {b}?",
            "I need {a} times {b}.",
        ),
        ("a", "b"),
    ),
    Tool(
        "random_number",
        "Draw a random number between two others.",
        {"low": _whole("The least"), "high": _whole("The most")},
        {"low": _between(0, 100), "high": _between(101, 9999)},
        lambda rng, pools, values: {"number": rng.randint(values["low"], values["high"])},
        "The number is {number}.",
        (
            "[Draw|Pick|Choose|Give me|Roll|Generate] a [|random |new ]number [between|from] {low} [and|to] {high}.",
            "[Random|random] number[|:|,] {low} [to|and|-] {high}",
            "[Tell me|Think of|Find] [a|any] number [between|from] {low} and {high}.",
            "I want a [|random ]number [that is at least {low} and at most|between {low} and|from {low} to] {high}.",
            "Which number [between|from] {low} and {high} [do you choose|will it be]?",
        ),
        (
            "Can you pick a number from {low} to {high}?",
            "Surprise me with a number between {low} and {high}.",
        ),
        ("low", "high"),
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        {"minutes": _whole("How long"), "label": _text("What the timer is for")},
        {"minutes": _between(1, 180), "label": Pools.label},
        lambda rng, pools, values: {"ends_at": pools.clock(rng)},
        "The timer ends at {ends_at}.",
        (
            "[Set|Start|Make|Create|Begin|Run] a timer [for|of|with|over] {minutes} minutes.",
            "[Set|Start|Make|Create|Begin] a {minutes} minute timer[| called {label}| for {label}].",
            "[Set|Start|Create] a timer for {minutes} minutes [called|named|with the label|and call it] {label}.",
            '[Set|Start|Create] a timer [called|named|with the label] "{label}" [for|of|over] {minutes} minutes.',
            "[Start|Set] a timer [named|called] {label}, {minutes} minutes.",
            '[Start|Set] [the|my|a] [timer "{label}"|"{label}" timer] [for|with|at] {minutes} minutes.',
            "[Timer|timer|New timer]: {minutes} minutes[|, {label}|, label {label}].",
            '[Timer|timer] "{label}", {minutes} minutes',
            "[Wake me|Ring|Beep|Remind me|Call me] [in|after] {minutes} minutes.",
            "[Count down|Time|Count] {minutes} minutes[| for {label}].",
            "{minutes} minutes[| for {label}], [start|go|starting now].",
        ),
        (
            "I need a timer for {minutes} minutes.",
            'Set a timer "{label}" that runs {minutes} minutes.',
            "Let a timer run for {minutes} minutes.",
            "Start a timer over {minutes} minutes and name it {label}.",
        ),
        ("minutes",),
    ),
    Tool(
        "set_alarm",
        "Set an alarm for a time of day.",
        {"time": _text("Time of day"), "label": _text("What the alarm is for")},
        {"time": Pools.clock, "label": Pools.label},
        lambda rng, pools, values: {"alarm": pools.number(rng)},
        "Alarm {alarm} is set for {time}.",
        (
            "[Set|Make|Create|Turn on|Add] an alarm [for|at] {time}[| called {label}| with the label {label}].",
            '[Set|Make|Create] an alarm [called|named|labelled] "{label}" [for|at] {time}.',
            "[Wake me|Wake me up|Ring|Get me up|Call me] at {time}.",
            "[Alarm|alarm|New alarm][|:| at| for] {time}[|, {label}]",
            "[At {time}|{time}], [ring|wake me|sound the alarm].",
            "I [have|want] to [wake up|get up|rise] at {time}.",
        ),
        (
            "I need an alarm at {time}.",
            "Can you wake me at {time}?",
            'Set an alarm "{label}" that rings at {time}.',
        ),
        ("time",),
    ),
    Tool(
        "create_reminder",
        "Remind someone of something on a day.",
        {"text": _text("What to be reminded of"), "date": _text("Which day")},
        {"text": Pools.phrase, "date": Pools.date},
        lambda rng, pools, values: {"reminder": pools.number(rng)},
        "Reminder {reminder} is set for {date}.",
        (
            '[Remind me|Tell me again] [of|about] "{text}" on {date}.',
            "[Remind me|Make me think] [of|about] {text} on {date}.",
            "[Create|Set|Add|Make] a reminder [for|on] {date}: {text}",
            '[Create|Set|Add|Make] a reminder [called|for|about|saying] "{text}" on {date}.',
            "On {date}, remind me [of|about|to do] {text}.",
            "[Reminder|reminder] [for|on] {date}: {text}",
            "I must not forget {text} on {date}.",
            '{date}: remind me [of|about] "{text}"',
        ),
        (
            'I need a reminder for "{text}" on {date}.',
            'Do not let me forget "{text}" on {date}.',
            "Can you remind me of {text} on {date}?",
        ),
        ("text", "date"),
    ),
    Tool(
        "add_event",
        "Put an event into the calendar.",
        {"title": _text("Name of the event"), "date": _text("Which day"), "time": _text("Time of day")},
        {"title": Pools.title, "date": Pools.date, "time": Pools.clock},
        lambda rng, pools, values: {"event": pools.number(rng)},
        "{title} is in the calendar as event {event}.",
        (
            "[Add|Create|Enter|Schedule|Plan] [|an event |the event ]{title} on {date}[| at {time}].",
            "[Put|Write] {title} [in|into] [my|the] calendar [on|for] {date}[| at {time}].",
            "[On {date}|At {time} on {date}] I have {title}. [Add it|Put it in the calendar|Note the event].",
            "[Calendar|New event|Event|Add to calendar]: {title}, {date}[|, {time}]",
            "[Schedule|Plan] {title} for {time} on {date}.",
            "[Add|Create] an event on {date} [at {time} |][called|named] {title}.",
        ),
        (
            "I need {title} in my calendar on {date}.",
            "Can you schedule {title} on {date} at {time}?",
            "Make an entry for {title} on {date} at {time}.",
        ),
        ("title", "date"),
    ),
    Tool(
        "translate",
        "Translate a text.",
        {"text": _text("What to translate"), "language": _text("Language to translate into")},
        {"text": Pools.phrase, "language": Pools.language},
        lambda rng, pools, values: {"translation": " ".join(pools.made_up(rng) for _ in values["text"].split())},
        'In {language} that is "{translation}".',
        (
            '[Translate|Turn|Render|Convert] [{text}|"{text}"] [into|to] {language}.',
            "[Translate|Translation] [into|to] {language}: {text}",
            '[How do you|How do I|How would one|How does one] say "{text}" in {language}?',
            '[What is|What\'s|What does one call] [{text}|"{text}"] in {language}?',
            '[Say|Write|Express] "{text}" in {language}.',
            '[Give me|Tell me|Find] the {language} [|translation |word |words ][for|of] [{text}|"{text}"].',
            '[In|Into] {language}[|, please]: [{text}|"{text}"]',
            "{text} in {language}[|?]",
            'I want to say "{text}" in {language}.',
            'What is the {language} [word |translation |][for|of] "{text}"?',
        ),
        (
            'Please put "{text}" into {language}.',
            'What would "{text}" be in {language}?',
            'I need "{text}" in {language}.',
            'Can you translate "{text}" into {language}?',
        ),
        ("text", "language"),
    ),
    Tool(
        "find_rhymes",
        "Words that rhyme with a word.",
        {"word": _text("The word"), "count": _whole("How many rhymes")},
        {"word": Pools.word, "count": _between(1, 12)},
        lambda rng, pools, values: {"rhymes": [pools.made_up(rng) for _ in range(rng.randint(1, 3))]},
        "These rhyme with {word}: {rhymes}.",
        (
            "[What|Which words|What words|Which word] [rhymes|rhyme] [with|on] {word}?",
            "[Find|Give me|Get|Look up|List|Search] [|some |a few ][rhymes|words that rhyme] [for|with] {word}.",
            "[Give me|Find|Get|List|I want] {count} [rhymes for|words that rhyme with|rhymes on] {word}.",
            "[Rhymes|rhymes|Rhyme] [for|with|on] {word}[|, {count} of them|: {count}]",
            "Does anything rhyme with {word}?",
            "[I am writing a poem|I write a song]. What rhymes with {word}?",
            "{word} rhymes with [what|which words]?",
            "{count} rhymes for {word}",
        ),
        (
            "I need a rhyme for {word}.",
            "Tell me {count} rhymes of {word}.",
            "Do you know rhymes for {word}?",
            "Show me words that rhyme with {word}.",
        ),
        ("word",),
    ),
    Tool(
        "spell",
        "Spell a word.",
        {"word": _text("The word")},
        {"word": Pools.word},
        lambda rng, pools, values: {"letters": "-".join(values["word"].upper())},
        "{word} is spelled {letters}.",
        (
            "[Spell|Spell out] [|the word |me ]{word}.",
            "[How do you|How do I|How does one] [spell|write] {word}?",
            "How is {word} [spelled|written]?",
            "[Spelling|spelling|Letters|The letters] of {word}",
            "[Tell me|Give me] the [letters|spelling] of {word}.",
            "[Which|What] letters [has|are in|make] {word}?",
        ),
        ("Can you spell {word}?", "What is the spelling of {word}?", "Show me how to spell {word}."),
        ("word",),
    ),
    Tool(
        "play_music",
        "Play a song.",
        {"title": _text("Title of the song"), "artist": _text("Who plays it")},
        {"title": Pools.title, "artist": Pools.person},
        lambda rng, pools, values: {"room": rng.choice(ROOMS)},
        "Now playing {title} in the {room}.",
        (
            "[Play|Start|Put on|Turn on] [|the song |some music: ]{title}.",
            "[Play|Start|Put on] [|the song |the track ]{title} [by|from|of] {artist}.",
            "I [want|would like|wish] to [hear|listen to] {title}[| by {artist}].",
            "[Play|play] {artist}'s {title}.",
            "[Play|Start] [something by {artist}, the song|from {artist} the song] {title}.",
            "[Music|Song|Next song|Play]: {title}[|, {artist}| by {artist}]",
            "[Let us|Let's] [hear|listen to] {title}[| by {artist}].",
            "The next song [is|should be] {title}[| by {artist}].",
        ),
        (
            "Let me listen to {title} by {artist}.",
            "Please play {title} for me.",
            "Can you put on {title} by {artist}?",
            "I feel like hearing {title}.",
        ),
        ("title",),
    ),
    Tool(
        "set_light",
        "Make the light in a room brighter or darker.",
        {"room": _text("Which room"), "percent": _whole("How bright")},
        {"room": _one_of(*ROOMS), "percent": _between(0, 100)},
        lambda rng, pools, values: {"watts": pools.few(rng)},
        "The {room} is lit at {percent} percent and uses {watts} watts.",
        (
            "[Set|Turn|Put|Change|Dim] the [light|lights|lamp|lamps] in the {room} to {percent} percent.",
            "[Set|Turn|Put|Dim] the {room} [light|lights|lamp] [to|at] {percent} percent.",
            "[Light|Lamp|Lights] in the {room}: {percent} percent",
            "[Make|Light] the {room} {percent} percent[| bright].",
            "{room}, light [at|to] {percent} percent",
            "I want {percent} percent light in the {room}.",
        ),
        (
            "Can you dim the {room} to {percent} percent?",
            "Give me {percent} percent of light in the {room}.",
        ),
        ("room", "percent"),
    ),
    Tool(
        "set_heating",
        "Heat a room.",
        {"room": _text("Which room"), "degrees": _real("How warm it should be")},
        {"room": _one_of(*ROOMS), "degrees": lambda pools, rng: rng.choice((rng.randint(10, 30), 21.5, 18.5))},
        lambda rng, pools, values: {"minutes": pools.few(rng)},
        "The {room} will have {degrees} degrees in {minutes} minutes.",
        (
            "[Heat|Warm|Warm up|Cool] the {room} to {degrees} degrees.",
            "[Set|Turn|Put] the [heating|heater|thermostat|temperature] in the {room} to {degrees}[| degrees].",
            "[Set|Put] the {room} [heating|heater] [to|at] {degrees}[| degrees].",
            "[Heating|Heat|Thermostat] [in the |]{room}: {degrees}[| degrees]",
            "I want {degrees} degrees in the {room}.",
            "Make it {degrees} degrees in the {room}.",
        ),
        (
            "Can you make the {room} {degrees} degrees warm?",
            "I would like to have {degrees} degrees in the {room}.",
        ),
        ("room", "degrees"),
    ),
    Tool(
        "send_message",
        "Send someone a message.",
        {"recipient": _text("Who gets it"), "text": _text("What it says")},
        {"recipient": Pools.person, "text": Pools.sentence},
        lambda rng, pools, values: {"sent_at": pools.clock(rng)},
        "The message to {recipient} went out at {sent_at}.",
        (
            "[Send|Write|Give] {recipient} [the|this|a] message: {text}",
            '[Send|Write|Text|Message] "{text}" to {recipient}.',
            '[Send|Write] [a|the] message [to|for] {recipient}: [{text}|"{text}"]',
            '[Write to|Text|Message|Tell|Inform] {recipient}[|:] "{text}".',
            "[Message|Text|Message for|Message to|Write to|Tell] {recipient}: {text}",
            '[Text|Tell|Message|Write to] {recipient} that "{text}".',
            '[Send|Write] {recipient} "{text}".',
            '[Send|Write] a message [that says|with the text|saying] "{text}" to {recipient}.',
            'To {recipient}: "{text}"',
            'I want to [tell|write to|message] {recipient}: "{text}"',
        ),
        (
            'Let {recipient} know: "{text}".',
            'Please send {recipient} a message saying "{text}".',
            'Can you text {recipient} "{text}"?',
            'Drop {recipient} a line: "{text}"',
        ),
        ("recipient", "text"),
    ),
    Tool(
        "send_email",
        "Send someone an email.",
        {"recipient": _text("Who gets it"), "subject": _text("What it is about"), "body": _text("What it says")},
        {"recipient": Pools.person, "subject": Pools.label, "body": Pools.sentence},
        lambda rng, pools, values: {"email": pools.number(rng)},
        "Email {email} to {recipient} is out.",
        (
            '[Email|Mail] {recipient}[| about {subject}]: "{body}"',
            '[Send|Write] [an email|an e-mail|a mail] to {recipient} about "{subject}"[|: "{body}"].',
            '[Send|Write] {recipient} an email with the subject "{subject}" and the [text|body] "{body}".',
            '[Email|Mail] to {recipient}, subject "{subject}"[|, body "{body}"]',
            '[Send|Write] the email "{body}" to {recipient}.',
            'I want to [email|mail] {recipient} about "{subject}".',
        ),
        (
            'Can you email {recipient} about "{subject}"?',
            'Compose an email to {recipient} about "{subject}" saying "{body}".',
        ),
        ("recipient",),
    ),
    Tool(
        "call_person",
        "Call someone on the phone.",
        {"name": _text("Whom to call")},
        {"name": Pools.person},
        lambda rng, pools, values: {"line": pools.few(rng)},
        "Calling {name} on line {line}.",
        (
            "[Call|Phone|Ring|Dial|Ring up|Telephone] {name}[|| now| on the phone].",
            "[I want|I have|I wish] to [call|phone|talk to|speak to|speak with] {name}.",
            "[Get|Give] me {name} on the [phone|line].",
            "[Make|Place|Start] a [|phone ]call [to|with] {name}.",
            "[Call|call|Phone call|Phone]: {name}",
            "Connect me [with|to] {name}.",
        ),
        ("Can you call {name}?", "Put me through to {name}.", "Let me talk to {name}."),
        ("name",),
        ("Call {} and {}.", "Phone {} and then {}."),
    ),
    Tool(
        "save_note",
        "Keep a note.",
        {"text": _text("What to note")},
        {"text": Pools.sentence},
        lambda rng, pools, values: {"note": pools.number(rng)},
        "That is note {note}.",
        (
            '[Note|Note down|Write down|Save|Keep|Jot down|Record][|:] "{text}".',
            "[Note|New note|Write down|Take a note|Note down|Save a note]: {text}",
            '[Make|Take|Save|Keep|Create|Add] a note [saying|that says|of|with the text|with] "{text}".',
            'I want to [note|write down|keep|save] "{text}".',
            '[Save|Keep] "{text}" [as|in] a note.',
        ),
        ('Please make a note: "{text}"', 'Can you write down "{text}"?', 'Put "{text}" in my notes.'),
        ("text",),
    ),
    Tool(
        "add_to_list",
        "Put things on a list.",
        {"list": _text("Name of the list"), "items": {"type": "array", "items": {"type": "string"}}},
        {"list": Pools.word, "items": Pools.several},
        lambda rng, pools, values: {"length": pools.few(rng)},
        "The list {list} now has {length} entries.",
        (
            "[Add|Put|Write|Append] {items} [to|on|onto] [the|my] {list} list.",
            "[Add|Put|Write|Append] {items} [to|on|onto] the list {list}.",
            "[List|On the list|To the list|My list] {list}: [add |]{items}",
            "[My|The] {list} list needs {items}.",
            "I want {items} on [the|my] {list} list.",
        ),
        ("Can you put {items} on my {list} list?", "Extend the list {list} by {items}."),
        ("list", "items"),
    ),
    Tool(
        "search_flights",
        "Find flights between two cities.",
        {"origin": _text("Where from"), "destination": _text("Where to"), "date": _text("Which day")},
        {"origin": Pools.city, "destination": Pools.city, "date": Pools.date},
        lambda rng, pools, values: {
            "flight": f"{rng.choice('ABKLS')}{rng.choice('AFKQY')}{pools.number(rng)}",
            "price": pools.number(rng),
        },
        "Flight {flight} from {origin} to {destination} costs {price}.",
        (
            "[Find|Search|Get|List|Look for] [flights|a flight] from {origin} to {destination}[,| on] {date}.",
            "[Find|Search|Look for] [flights|a flight] to {destination} from {origin} on {date}.",
            "I [want|have|need] to fly [from {origin} to {destination}|to {destination} from {origin}] on {date}.",
            "[Flights|flights|Plane] [to {destination} from {origin}|from {origin} to {destination}][,| on] {date}",
            "On {date} I fly from {origin} to {destination}. [What|Which] flights are there?",
            "[Are there|Is there|What are the] [flights|planes|any flight] from {origin} to {destination} on {date}?",
            "On {date}, [fly me|find a flight|find flights] from {origin} to {destination}.",
            "How do I fly from {origin} to {destination} on {date}?",
        ),
        (
            "Which flights go from {origin} to {destination} on {date}?",
            "Get me from {origin} to {destination} by plane on {date}.",
            "Can I fly from {origin} to {destination} on {date}?",
        ),
        ("origin", "destination", "date"),
    ),
    Tool(
        "search_trains",
        "Find trains between two cities.",
        {"origin": _text("Where from"), "destination": _text("Where to"), "time": _text("Leaving after")},
        {"origin": Pools.city, "destination": Pools.city, "time": Pools.clock},
        lambda rng, pools, values: {"train": pools.number(rng), "leaves": pools.clock(rng)},
        "Train {train} from {origin} to {destination} leaves at {leaves}.",
        (
            "[Find|Search|Get|List|Look for] [|me ][trains|a train] from {origin} to {destination}[| after {time}].",
            "[When|At what time] [does|is] the [next |]train from {origin} to {destination}[| after {time}]?",
            "[Trains|trains|Train|Railway] from {origin} to {destination}[|, after {time}]",
            "I [want|have] to [go|travel] from {origin} to {destination} by [train|rail][| after {time}].",
            "[Are there|Is there] [trains|a train] from {origin} to {destination}[| after {time}]?",
            "After {time}, which trains [run|leave] from {origin} to {destination}?",
        ),
        (
            "Which trains go from {origin} to {destination} after {time}?",
            "Can I take a train from {origin} to {destination}?",
            "Get me from {origin} to {destination} by rail.",
        ),
        ("origin", "destination"),
    ),
    Tool(
        "book_hotel",
        "Book a room in a hotel.",
        {"city": _text("Where"), "nights": _whole("How many nights"), "date": _text("First day")},
        {"city": Pools.city, "nights": Pools.few, "date": Pools.date},
        lambda rng, pools, values: {"hotel": pools.title(rng), "room": pools.number(rng)},
        "Room {room} at {hotel} in {city} is yours.",
        (
            "[Book|Reserve|Find|Get] [|me ]a [hotel|room|hotel room] in {city} for {nights} nights[| from {date}].",
            "[Book|Reserve] {nights} nights in [|a hotel in ]{city}[| from {date}| starting {date}].",
            "I [want|have] to [stay|sleep] in {city} for {nights} nights[| from {date}].",
            "[Hotel|hotel|Room] in {city}, {nights} nights[|, from {date}]",
            "From {date}, [book|reserve] a [hotel|room] in {city} for {nights} nights.",
            "We [stay|are] in {city} [|for ]{nights} nights. [Book|Find] a hotel.",
        ),
        (
            "Can you get me a room in {city} for {nights} nights?",
            "I need a hotel in {city} from {date} for {nights} nights.",
        ),
        ("city", "nights"),
    ),
    Tool(
        "book_table",
        "Book a table at a restaurant.",
        {
            "restaurant": _text("Name of the restaurant"),
            "people": _whole("How many guests"),
            "time": _text("Time of day"),
        },
        {"restaurant": Pools.title, "people": Pools.few, "time": Pools.clock},
        lambda rng, pools, values: {"table": rng.randint(1, 99)},
        "Table {table} at {restaurant} is yours at {time}.",
        (
            "[Book|Reserve|Get|Order] [|us |me ]a table at {restaurant} for {people}[| people| guests] at {time}.",
            "[Book|Reserve] a table for {people}[| people| guests] at {restaurant}[,| at] {time}.",
            "[Book|Reserve] a table for {people}[| people] at {time} at {restaurant}.",
            "We are {people} and want to [eat|dine] at {restaurant} at {time}.",
            "I [need|want|would like] a table at {restaurant} at {time} for {people} [people|guests|persons].",
            "[Table|table|A table] for {people}[| people][,| at] {restaurant}, {time}",
            "At {time}, [book|reserve] [a table|dinner] for {people} at {restaurant}.",
            "[Reserve|Book] {restaurant} at {time} for {people}[| people].",
        ),
        (
            "Can we get a table for {people} at {restaurant} at {time}?",
            "Please reserve {restaurant} for {people} guests at {time}.",
            "There are {people} of us for {restaurant} at {time}, book a table.",
        ),
        ("restaurant", "people", "time"),
    ),
    Tool(
        "order_taxi",
        "Order a taxi.",
        {"pickup": _text("Where to be met"), "people": _whole("How many passengers"), "time": _text("When")},
        {"pickup": Pools.title, "people": Pools.few, "time": Pools.clock},
        lambda rng, pools, values: {"taxi": pools.number(rng)},
        "Taxi {taxi} comes to {pickup}.",
        (
            "[Order|Call|Get|Send|Book] [|me |us ]a [taxi|cab] [to|at] {pickup} for {people}[| people][| at {time}].",
            "[Taxi|taxi|Cab] [to|at] {pickup}[|, {people} people][|, {time}]",
            "I [want|would like] a [taxi|cab] at {pickup}[| at {time}].",
            "[Pick me up|Pick us up|Fetch me] [with|by] [taxi|a cab] at {pickup}[| at {time}].",
            "We are {people} and want a [taxi|cab] at {pickup}[| at {time}].",
        ),
        ("I need a taxi at {pickup} at {time}.", "Can you get us a cab to {pickup} for {people}?"),
        ("pickup",),
    ),
    Tool(
        "get_stock_price",
        "The price of a share.",
        {"symbol": _text("Symbol of the share")},
        {"symbol": Pools.symbol},
        lambda rng, pools, values: {"price": pools.decimal(rng), "currency": rng.choice(CURRENCIES)},
        "{symbol} is at {price} {currency}.",
        (
            "[What is|What's|Tell me|Give me|Get|Find|Look up|Check] the [|share |stock |current ]price of {symbol}.",
            "How is [|the share |the stock ]{symbol} doing[| today]?",
            "[Stock price|Share price|Price|Stock|Share|price|Quote] [of|for] {symbol}",
            "How much [is|costs] [one|a] [share|stock] of {symbol}?",
            "How much [is|are] {symbol}[| shares| stock] [worth|now|today]?",
            "[Where|At what price] is {symbol}[| now| today]?",
            "I want to [buy|sell] {symbol}. [What is the price|How much is it]?",
            "{symbol}[| share| stock] price",
        ),
        (
            "What does a share of {symbol} cost?",
            "Look up the stock {symbol}.",
            "Can you check {symbol} for me?",
        ),
        ("symbol",),
        ("What is the price of {} and {}?", "How are {} and {} doing?"),
    ),
    Tool(
        "track_package",
        "Where a package is.",
        {"code": _text("Code of the package")},
        {"code": Pools.code},
        lambda rng, pools, values: {"place": pools.city(rng), "days": pools.few(rng)},
        "Package {code} is in {place} and needs {days} more days.",
        (
            "[Where is|Track|Find|Follow|Locate|Look up] [|my |the |a ][package|parcel|shipment] {code}.",
            "[When|On which day] [does|will] [|the |my ][package|parcel] {code} [arrive|come]?",
            "[Package|package|Parcel|Track|Tracking]: {code}",
            "My [package|parcel] has the [code|number] {code}. [Where is it|When does it come]?",
            "[Status|Place] of [package|parcel] {code}",
            "What [happened to|about] [my|the] [package|parcel] {code}?",
        ),
        ("Can you track {code}?", "Has package {code} arrived?", "Show me where parcel {code} is."),
        ("code",),
    ),
    Tool(
        "read_file",
        "Read a file.",
        {"path": _text("Which file"), "lines": _whole("How many lines")},
        {"path": Pools.code, "lines": Pools.number},
        lambda rng, pools, values: {"content": pools.sentence(rng)},
        "It says: {content}",
        (
            "[Read|Open|Print|Show|Display|Load] [|me ][|the |my ]file {path}.",
            "[Read|Print|Show|Give me|Get] [|the ][first |top |]{lines} lines of [|the file ]{path}.",
            "[What is|What's|What stands] in [|the file ]{path}?",
            "[File|Read|read|cat] {path}",
            "What does [|the file ]{path} [say|contain]?",
            "[Read|Open] {path}, {lines} lines.",
        ),
        ("Can you read {path}?", "Show me what is in {path}.", "I need the first {lines} lines of {path}."),
        ("path",),
    ),
    Tool(
        "search_web",
        "Search the web.",
        {"query": _text("What to look for"), "count": _whole("How many results")},
        {"query": Pools.phrase, "count": Pools.few},
        lambda rng, pools, values: {"best": pools.title(rng), "hits": pools.number(rng)},
        "There are {hits} hits; the best is {best}.",
        (
            '[Search|Search the web|Search online|Google|Look on the web|Look online] for "{query}".',
            "[Search|Search for|Web search|Google|Search the internet for]: {query}",
            '[Find|Get|Give me] [|{count} ][results|pages|sites|articles] [about|on|for] "{query}"[| on the web].',
            "[Find|Search] {query} [online|on the web|on the internet].",
            "What does the [web|internet] say about {query}?",
            'I want [{count} pages|to read] about "{query}" [online|from the web].',
        ),
        (
            'Can you search for "{query}"?',
            "See what the web has on {query}.",
            'I need {count} web pages about "{query}".',
        ),
        ("query",),
    ),
)

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
_MENTIONS = (  # how an argument is told; the last three are held out
    "{name} {value}",
    "{name} {value}",
    "{name} is {value}",
    "{name}: {value}",
    "{name}={value}",
    "{name} = {value}",
    "the {name} {value}",
    "the {name} is {value}",
    "the {name} should be {value}",
    "{name} must be {value}",
    "{value} as {name}",
    "{value} as the {name}",
    "{value} for {name}",
    "{value} for the {name}",
    "{name} set to {value}",
    "a {name} of {value}",
    '{name} "{value}"',
    '{name} is "{value}"',
    '{name}: "{value}"',
    "{name} equal to {value}",
    "{name} -> {value}",
    "its {name} is {value}",
    "{name} to {value}",
    "{name} being {value}",
    "the {name} has to be {value}",
    "{value} is the {name}",
)
_BY_NAME = (
    "[Call|Use|Run|Invoke|Execute|Try|Apply|Trigger|Do|Perform] [|the tool |the function |tool ]{tool}",
    "[I want|I wish|I have|It is time] to [call|use|run|invoke|try] {tool}",
    "[Make|Start] a call [to|of] {tool}",
    "[Let us|Let's] [call|use|run|do] {tool}",
    "[Answer|Work|Help me] with {tool}",
    "{tool}",
)
_BY_NAME_HELD_OUT = ("Please call {tool}", "Can you run {tool}", "I need a call of {tool}")
_BY_DEED = (
    "{deed} [the|the|the|this|my|a|that] {thing}",
    "[I want to|I have to|I wish to|Let us|Help me|It is time to|We must|You should] {deed} [the|my|this] {thing}",
    "{deed} {thing}",
    "The {thing}: {deed} it",
)
_BY_DEED_HELD_OUT = ("Can you {deed} the {thing}", "I would like to {deed} the {thing}", "Time to {deed} my {thing}")
_JOINTS = (" with ", " with ", ": ", " using ", ", ", " where ", " and set ", " - ", ", with ", " given ", ". ", "\n")


def made_up(rng: random.Random, pools: Pools, thing: str = "") -> Tool:
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
    asks, held_out = ([_ask(rng, name, deeds, names, needed, out) for _ in range(3)] for out in (False, True))
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
        return {"type": "string", "enum": choices}, _one_of(*choices)
    return {"type": "array", "items": {"type": "string"}}, Pools.several


def _any_value(rng: random.Random, pools: Pools) -> Any:
    draws = (Pools.phrase, Pools.made_up, Pools.number, Pools.number, Pools.decimal, Pools.clock, Pools.code)
    return rng.choice(draws)(pools, rng)


def _ask(
    rng: random.Random, tool: str, deeds: dict[str, str], parameters: list[str], needed: tuple[str, ...], held_out: bool
) -> str:
    """A way to ask for a made-up tool by its name or by what it does, each argument told in a way of its own."""
    unusual = rng.random() < 0.5  # what is held out: the verb, or how the arguments are told
    by_deed = bool(deeds) and rng.random() < 0.5
    if held_out and unusual:
        verbs = _BY_DEED_HELD_OUT if by_deed else _BY_NAME_HELD_OUT
    else:
        verbs = _BY_DEED if by_deed else _BY_NAME
    verb = expanded(rng, rng.choice(verbs)).format(tool=tool, **deeds)
    mentions = _MENTIONS[-3:] if held_out and not unusual else _MENTIONS[:-3]
    given = [name for name in parameters if name in needed or rng.random() < 0.6]
    rng.shuffle(given)
    same = rng.choice(mentions) if rng.random() < 0.6 else ""
    parts = []
    for parameter in given:
        name = parameter.replace("_", " ") if rng.random() < 0.5 else parameter
        parts.append((same or rng.choice(mentions)).format(name=name, value=f"{{{parameter}}}"))
    if not held_out and not by_deed and rng.random() < 0.08:
        return f"{tool}({', '.join(f'{name}={{{name}}}' for name in given)})"
    comma = rng.choice((", ", ", ", "; ", " and ", "\n"))
    last = rng.choice((" and ", ", and ", comma)) if comma != "\n" else comma
    told = parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + last + parts[-1]
    if rng.random() < 0.15:
        return f"{rng.choice(('With ', 'Given ', 'For ')) if not held_out else 'With '}{told}, {verb}."
    end = "?" if verb.startswith("Can") else "."
    return f"{verb[:1].upper() if by_deed else verb[:1]}{verb[1:]}{rng.choice(_JOINTS)}{told}{end}"
