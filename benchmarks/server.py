"""The server under load, and what a preamble costs that it has read before.

    python -m benchmarks.server --clients 16 --seconds 300
    python -m benchmarks.server --preamble 4000

Load: clients that ask the demo model for definitions without a pause, twice as many as may wait. Of ten requests seven
are streams that are read at once, one is read slowly, one is left in the middle, and one is malformed. Every answer is
compared with what the model says when nobody else asks; every refusal must come with its reason. Times to the first
token include the wait in the queue. Memory is the server's, sampled every second: its median in the first and in the
last fifth of the run; ``more_kept_mb`` of it are prompts that it remembers.

Preamble: questions after the same system message, with the server's memory for prompts and without, in turns.
The last line is JSON.
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import psutil

from benchmarks.record import record

WORDS = ("heron", "sofa", "marimba", "ferry", "walnut", "hammer", "lantern", "otter", "violin", "carrot")
MALFORMED = (b"", b"{", b"[1]", b'{"messages": []}', b'{"messages": 3}', b"\xff\xfe", b'{"messages": [{"role": "x"}]}')
PATH = "/v1/chat/completions"


@dataclass
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


class Client:
    """Asks one server.

    Args:
        port (int): of the server.
    """

    def __init__(self, port: int):
        self._port = port

    @contextmanager
    def post(self, body: bytes) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, whose connection ends with it."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def kept_bytes(self) -> float:
        """What the server keeps of prompts that may come again."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return float(next(line.split()[1] for line in lines if line.startswith("flashmoe_prefix_bytes ")))

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, float, int]:
        """The text, the seconds to its first token, and the tokens of the prompt that needed no reading."""
        request = {"messages": messages, "stream": True, "max_tokens": max_tokens}
        body = json.dumps({**request, "stream_options": {"include_usage": True}}).encode()
        begin = time.perf_counter()
        text, first, cached = "", 0.0, 0
        with self.post(body) as response:
            assert response.status == 200, response.read()
            for event in events(response):
                if usage := event.get("usage"):
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
                elif content := event["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - begin
                    text += content
        return text, first, cached


def events(response: http.client.HTTPResponse, pause: float = 0) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, up to its end."""
    for line in response:
        time.sleep(pause)
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            event: dict[str, Any] = json.loads(line[6:])
            yield event
        elif line.startswith(b"data: "):
            return
    raise ConnectionError("a stream ended without its mark")


@contextmanager
def serve(*options: str) -> Iterator[tuple[Client, psutil.Process]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "flashmoe_mlx.server", "--port", "0", "--log-level", "ERROR", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("listening on "):
                yield Client(int(line.rpartition(":")[2].partition("/")[0])), psutil.Process(process.pid)
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is a {word}?"}]


def ask(client: Client, chance: random.Random, expected: dict[str, str], tally: Tally) -> None:
    """One request, of a kind that chance chooses."""
    kind = chance.choices(("read", "read slowly", "left", "malformed"), (7, 1, 1, 1))[0]
    word = chance.choice(WORDS)
    body = json.dumps({"messages": question(word), "stream": True}).encode()
    if kind == "malformed":
        body = chance.choice(MALFORMED)
    begin = time.perf_counter()
    with client.post(body) as response:
        if response.status != 200:
            reason = json.loads(response.read())["error"]["message"]
            assert reason and response.status == (400 if kind == "malformed" else 429), (response.status, reason)
            tally.outcomes[f"{kind}: {response.status}"] += 1
            if response.status == 429:
                time.sleep(chance.uniform(0.5, 2))
            return
        text, tokens = "", 0
        for event in events(response, 0.05 if kind == "read slowly" else 0):
            if content := event["choices"][0]["delta"].get("content"):
                if not text and kind != "read slowly":
                    tally.first_tokens.append(time.perf_counter() - begin)
                text += content
                tokens += 1
                if kind == "left" and tokens == 5:
                    break
        if not (expected[word].startswith(text) if kind == "left" else text == expected[word]):
            tally.wrong.append(f"{word}: {text}")
        tally.tokens += tokens
        tally.outcomes[kind] += 1


def load(clients: int, seconds: float) -> dict[str, Any]:
    """The figures of a run with many clients."""
    tally = Tally()
    resident: list[int] = []
    with serve("--max-queue", str(clients // 2)) as (client, process):
        expected = {word: client.answer(question(word), 60)[0] for word in WORDS}
        kept_before = client.kept_bytes()
        deadline = time.perf_counter() + seconds

        def use(seed: int) -> None:
            chance = random.Random(seed)
            while time.perf_counter() < deadline:
                try:
                    ask(client, chance, expected, tally)
                except Exception as error:
                    tally.wrong.append(f"{type(error).__name__}: {error}")

        users = [threading.Thread(target=use, args=(seed,)) for seed in range(clients)]
        begin = time.perf_counter()
        for user in users:
            user.start()
        while any(user.is_alive() for user in users):
            resident.append(process.memory_info().rss)
            time.sleep(1)
        elapsed = time.perf_counter() - begin
        assert client.answer(question("heron"), 60)[0] == expected["heron"]
        kept = client.kept_bytes() - kept_before
    for wrong in tally.wrong[:10]:
        print(f"wrong: {wrong}")
    part = max(1, len(resident) // 5)
    percentiles = quantiles(tally.first_tokens, n=20)
    return {
        "clients": clients,
        "seconds": round(elapsed),
        "requests": sum(tally.outcomes.values()),
        "wrong": len(tally.wrong),
        "refused_full": sum(count for outcome, count in tally.outcomes.items() if outcome.endswith("429")),
        "refused_malformed": tally.outcomes["malformed: 400"],
        "left": tally.outcomes["left"],
        "read_slowly": tally.outcomes["read slowly"],
        "ttft_p50": round(percentiles[9], 2),
        "ttft_p95": round(percentiles[18], 2),
        "tps": round(tally.tokens / elapsed, 1),
        "first_mb": round(median(resident[:part]) / 1e6, 1),
        "last_mb": round(median(resident[-part:]) / 1e6, 1),
        "more_kept_mb": round(kept / 1e6, 1),
    }


def preamble(tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of questions after a long system message."""
    system = {"role": "system", "content": "You are a pocket dictionary. " * (tokens // 7)}
    remembered, forgotten = [], []
    with serve() as (ours, _), serve("--prompt-cache-bytes", "0") as (other, _):
        cold = ours.answer([system, *question("otter")], 2)[1]
        for word in WORDS[:rounds]:
            text, first, cached = ours.answer([system, *question(word)], 12)
            assert cached, "nothing was kept"
            remembered.append(first)
            again, first, cached = other.answer([system, *question(word)], 12)
            assert again == text and not cached
            forgotten.append(first)
    return {
        "first_ttft": round(cold, 2),
        "ttft_with": round(median(remembered), 3),
        "ttft_without": round(median(forgotten), 2),
        "ratio": round(median(without / with_ for with_, without in zip(remembered, forgotten, strict=True)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help="how many ask at once")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--preamble", type=int, metavar="TOKENS", help="of the system message, about")
    parser.add_argument("--rounds", type=int, default=3, help="questions after it")
    parser.add_argument("--record", action="store_true", help="append the figures to results/server_*.csv")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    if args.clients:
        figures["load"] = load(args.clients, args.seconds)
        print(figures["load"])
    if args.preamble:
        figures["preamble"] = {"tokens": args.preamble, **preamble(args.preamble, args.rounds)}
        print(figures["preamble"])
    if args.record:
        for name, line in figures.items():
            record(f"server_{name}", line)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
