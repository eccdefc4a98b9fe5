"""Do tool calls parse and fit their schema, with and without the constraint, as the experts get fewer bits?

    python -m benchmarks.tool_calls --model FOLDER --requests 200 --bits 8 4 3 2

Each request has 1 to 8 tools with flat and nested schemas, drawn at random from a seed, and asks for one of them at
temperature 1. The constrained model must call a tool; the unconstrained one is asked the same and may do as it likes:
``unconstrained_calls`` is how often it opens a call. A call counts if mlx-lm's parser reads it and its arguments fit by
the jsonschema library. In brackets 95% intervals (Wilson). The last line is JSON.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx
from flashmoe_mlx.requantize import requantize
from jsonschema import Draft202012Validator
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flashmoe_mlx
from benchmarks.record import record
from flashmoe_mlx.constrain import Processor, constrained, read_calls, vocabulary_of
from flashmoe_mlx.evaluation.metrics import share

Tool = dict[str, Any]

VERBS = ("get", "find", "set", "send", "book", "list", "play", "count", "open", "move", "price", "convert")
NOUNS = ("weather", "train", "alarm", "mail", "room", "song", "word", "file", "shop", "light", "route", "note")
FIELDS = ("city", "name", "day", "amount", "kind", "query", "place", "unit", "person", "size")
TEXTS = ("Paris", "a red lamp", "Anna", "7 km", "null", "[urgent] call", "12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=Path("build/tool_calls"))
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    rows = []
    for bits in args.bits:
        row = measure(requantize(args.model, bits, args.cache_dir), bits, args)
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if args.record:
            record("tool_calls", row)
    print(json.dumps({"rows": rows}))


def measure(folder: Path, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a model at one bit width."""
    model, tokenizer = flashmoe_mlx.load(str(folder), ram_budget="auto")
    vocabulary = vocabulary_of(tokenizer)
    counts = {"constrained": 0, "unconstrained": 0, "unconstrained_calls": 0}
    unended, building = 0, 0.0
    seconds: list[float] = []  # of each token
    for number in range(args.requests):
        tools, question = request(random.Random(args.seed * 1_000_003 + number))
        messages = [{"role": "user", "content": question}]
        prompt = Prompt(model, tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True))
        begin = time.perf_counter()
        processor = constrained(tokenizer, tools=tools, tool_choice="required", vocabulary=vocabulary)
        building += time.perf_counter() - begin
        timed = Timed(processor)
        held = written(model, tokenizer, prompt, args.max_tokens, number, timed)
        free = written(model, tokenizer, prompt, args.max_tokens, number)
        counts["constrained"] += fits(held, tools, tokenizer)
        counts["unconstrained"] += fits(free, tools, tokenizer)
        counts["unconstrained_calls"] += tokenizer.tool_call_start in free
        unended += tokenizer.tool_call_end not in held
        seconds += timed.seconds
    figures: dict[str, Any] = {"bits": bits, "requests": args.requests, "constrained_unended": unended}
    for name, count in counts.items():
        estimate = share(count, args.requests)
        figures |= {name: count, f"{name}_low": round(estimate.low, 4), f"{name}_high": round(estimate.high, 4)}
    figures |= {
        "constraint_us_mean": round(1e6 * mean(seconds), 1),
        "constraint_us_median": round(1e6 * median(seconds), 1),
    }
    return figures | {"constraint_ms_per_request": round(1e3 * building / args.requests, 2), "seed": args.seed}


class Timed:
    """A processor that tells how long it works, evaluation of its bias included.

    Args:
        processor: the one to time.

    Attributes:
        seconds (list[float]): spent in each call of it, of which there is one a token.
    """

    def __init__(self, processor: Processor):
        self._processor = processor
        self.seconds: list[float] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        mx.eval(tokens, logits)  # the model's own work is not the constraint's
        begin = time.perf_counter()
        logits = self._processor(tokens, logits)
        mx.eval(logits)
        self.seconds.append(time.perf_counter() - begin)
        return logits


class Prompt:
    """A prompt that is read once, however many answers it gets."""

    def __init__(self, model: Any, tokens: list[int]):
        self._cache = make_prompt_cache(model)
        self.last = tokens[-1:]
        mx.eval(model(mx.array([tokens[:-1]]), cache=self._cache), [layer.state for layer in self._cache])

    def cache(self) -> list[Any]:
        """A copy of what the model knows of all tokens but the last."""
        return copy.deepcopy(self._cache)


def written(
    model: Any, tokenizer: TokenizerWrapper, prompt: Prompt, most: int, seed: int, processor: Processor | None = None
) -> str:
    """What the model answers, up to the end of its first call."""
    mx.random.seed(seed)
    text = ""
    for response in stream_generate(
        model,
        tokenizer,
        prompt.last,
        prompt_cache=prompt.cache(),
        max_tokens=most,
        sampler=make_sampler(1.0),
        logits_processors=[processor] if processor else [],
    ):
        text += response.text
        if tokenizer.tool_call_end in text:
            break
    return text


def fits(text: str, tools: list[Tool], tokenizer: TokenizerWrapper) -> bool:
    """Whether the first call in a text can be read, is of a tool, and has arguments that fit."""
    _, start, rest = text.partition(tokenizer.tool_call_start)
    call, end, _ = rest.partition(tokenizer.tool_call_end)
    if not start or not end:
        return False
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    try:
        (read,) = read_calls(tokenizer, call.strip(), tools)
        return Draft202012Validator(schemas[read.name]).is_valid(json.loads(read.arguments))
    except (ValueError, KeyError):
        return False


def request(draw: random.Random) -> tuple[list[Tool], str]:
    """Tools, and a question that one of them answers."""
    names = draw.sample([f"{verb}_{noun}" for verb in VERBS for noun in NOUNS], draw.randint(1, 8))
    tools = [_tool(draw, name) for name in names]
    wanted = draw.choice(tools)["function"]
    given = [f"{key} {draw.choice(TEXTS)}" for key in wanted["parameters"]["properties"]]
    return tools, f"Please {wanted['name'].replace('_', ' ')} with {', '.join(given)}."


def _tool(draw: random.Random, name: str) -> Tool:
    parameters = _object(draw, draw.randint(1, 3), depth=draw.randint(0, 2))
    verb, noun = name.split("_")
    function = {"name": name, "description": f"{verb} a {noun}".capitalize(), "parameters": parameters}
    return {"type": "function", "function": function}


def _object(draw: random.Random, size: int, depth: int) -> dict[str, Any]:
    properties = {key: _value(draw, depth) for key in draw.sample(FIELDS, size)}
    required = [key for key in properties if draw.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    if depth and draw.random() < 0.5:
        if draw.random() < 0.5:
            return _object(draw, draw.randint(1, 2), depth - 1)
        return {"type": "array", "items": _value(draw, depth - 1), "maxItems": 3}
    scalars: list[dict[str, Any]] = [{"type": "string", "maxLength": 20}, {"type": "boolean"}]
    scalars += [{"type": "integer", "minimum": 0, "maximum": 100}, {"type": "number", "minimum": 0, "maximum": 10}]
    scalars += [{"enum": ["small", "middle", "large"]}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}]
    return draw.choice(scalars)


if __name__ == "__main__":
    main()
