"""Share of tool calls that parse and fit their schema, with and without the constraint, as the experts get fewer bits.

    python -m benchmarks.tool_calls --model FOLDER --requests 200 --bits 8 4 3 2

Each request has 1 to 8 tools with flat and nested schemas, drawn at random from a seed, and asks for one of them at
temperature 1. The constrained model must call a tool. The unconstrained one is asked the same, and may answer anything:
``unconstrained_calls`` is the number of answers that begin a call. A call counts if it can be read and its
arguments fit by the jsonschema library. ``_low`` and ``_high`` are the ends of 95% intervals (Wilson).

What is predicted is that all constrained calls fit which end within ``--max-tokens``; ``measured_over_predicted`` is
the share that does. The last line is JSON.
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
from jsonschema import Draft202012Validator
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flashmoe_mlx
from benchmarks.record import record
from flashmoe_mlx.constrain import Processor, constrained, read_calls, vocabulary_of
from flashmoe_mlx.evaluation.metrics import share
from flashmoe_mlx.model.requantize import requantize

Tool = dict[str, Any]

VERBS = ("get", "find", "set", "send", "book", "list", "play", "count", "open", "move", "price", "convert")
NOUNS = ("weather", "train", "alarm", "mail", "room", "song", "word", "file", "shop", "light", "route", "note")
FIELDS = ("city", "name", "day", "amount", "kind", "query", "place", "unit", "person", "size")
TEXTS = ("Paris", "a red lamp", "Anna", "7 km", "null", "[urgent] call", "12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="folder (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], help="of the experts (default: 8 4 3 2)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("build/tool_calls"),
        help="of requantized copies (default: %(default)s)",
    )
    parser.add_argument("--record", action="store_true", help="append the figures to results/tool_calls.csv")
    args = parser.parse_args()
    rows = []
    for bits in args.bits:
        row = measure(requantize(args.model, bits, args.cache_dir), bits, args)
        rows.append(row)
        print(
            f"{bits} bits: {row['constrained']} of {args.requests} constrained calls fit, measured / predicted "
            f"{row['measured_over_predicted']:.2f}; unconstrained {row['unconstrained']} fit of "
            f"{row['unconstrained_calls']} that began; the constraint takes {row['constraint_us_median']} us a token",
            flush=True,
        )
        if args.record:
            record("tool_calls", row)
    print(json.dumps({"rows": rows}))


def measure(folder: Path, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a model at one bit width."""
    model, tokenizer = flashmoe_mlx.load(str(folder), ram_budget="auto")[:2]
    vocabulary = vocabulary_of(tokenizer)
    counts = {"constrained": 0, "unconstrained": 0, "unconstrained_calls": 0}
    unended, building = 0, 0.0
    # Of each token.
    seconds: list[float] = []
    for number in range(args.requests):
        tools, question = request(random.Random(args.seed * 1_000_003 + number))
        messages = [{"role": "user", "content": question}]
        prompt = Prompt(model, tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True))
        begin = time.perf_counter()
        processor = constrained(tokenizer, tools=tools, tool_choice="required", vocabulary=vocabulary)
        building += time.perf_counter() - begin
        timed = Timed(processor)
        with_constraint = answer(model, tokenizer, prompt, args.max_tokens, number, timed)
        without = answer(model, tokenizer, prompt, args.max_tokens, number)
        counts["constrained"] += fits(with_constraint, tools, tokenizer)
        counts["unconstrained"] += fits(without, tools, tokenizer)
        counts["unconstrained_calls"] += tokenizer.tool_call_start in without
        unended += tokenizer.tool_call_end not in with_constraint
        seconds += timed.seconds
    ended = args.requests - unended
    figures: dict[str, Any] = {
        "model": args.model.name,
        "bits": bits,
        "requests": args.requests,
        "constrained_unended": unended,
        "measured_over_predicted": round(counts["constrained"] / ended, 4) if ended else None,
    }
    for name, count in counts.items():
        estimate = share(count, args.requests)
        figures |= {name: count, f"{name}_low": round(estimate.low, 4), f"{name}_high": round(estimate.high, 4)}
    figures |= {
        "constraint_us_mean": round(1e6 * mean(seconds), 1),
        "constraint_us_median": round(1e6 * median(seconds), 1),
    }
    return figures | {"constraint_ms_per_request": round(1e3 * building / args.requests, 2), "seed": args.seed}


class Timed:
    """A logits processor that is timed, evaluation of its bias included.

    Args:
        processor (Processor): The one to time.

    Attributes:
        seconds (list[float]): Time of each call, of which there is one per token.
    """

    def __init__(self, processor: Processor):
        self._processor = processor
        self.seconds: list[float] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # The model's own work does not count.
        mx.eval(tokens, logits)
        begin = time.perf_counter()
        logits = self._processor(tokens, logits)
        mx.eval(logits)
        self.seconds.append(time.perf_counter() - begin)
        return logits


class Prompt:
    """A prompt that is read once and answered several times.

    Args:
        model (nn.Module): The model that reads it.
        tokens (list[int]): Its tokens.

    Attributes:
        last (list[int]): Its last token, with which an answer begins.
    """

    def __init__(self, model: Any, tokens: list[int]):
        self._cache = make_prompt_cache(model)
        self.last = tokens[-1:]
        mx.eval(model(mx.array([tokens[:-1]]), cache=self._cache), [layer.state for layer in self._cache])

    def cache(self) -> list[Any]:
        """Return a copy of the model's state after all tokens but the last."""
        return copy.deepcopy(self._cache)


def answer(
    model: Any, tokenizer: TokenizerWrapper, prompt: Prompt, max_tokens: int, seed: int, processor: Timed | None = None
) -> str:
    """Return the model's answer, up to the end of its first call."""
    mx.random.seed(seed)
    text = ""
    for response in stream_generate(
        model,
        tokenizer,
        prompt.last,
        prompt_cache=prompt.cache(),
        max_tokens=max_tokens,
        sampler=make_sampler(1.0),
        logits_processors=[processor] if processor else [],
    ):
        text += response.text
        if tokenizer.tool_call_end in text:
            break
    return text


def fits(text: str, tools: list[Tool], tokenizer: TokenizerWrapper) -> bool:
    """Return whether the first call in a text can be parsed, names a tool, and has arguments that fit."""
    _, start, rest = text.partition(tokenizer.tool_call_start)
    call, end, _ = rest.partition(tokenizer.tool_call_end)
    if not start or not end:
        return False
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    try:
        (parsed,) = read_calls(tokenizer, call, tools)
        return bool(Draft202012Validator(schemas[parsed.name]).is_valid(json.loads(parsed.arguments)))
    except (ValueError, KeyError):
        return False


def request(draw: random.Random) -> tuple[list[Tool], str]:
    """Return tools, and a question that one of them answers."""
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
