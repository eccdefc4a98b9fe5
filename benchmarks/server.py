"""Throughput and latency of the server under load, and with a preamble that its prefix cache holds.

    python -m benchmarks.server --clients 16 --seconds 300
    python -m benchmarks.server --preamble 4000

Load: clients that ask the demo model for definitions without a pause, twice as many as the queue holds. Of ten requests
seven are streams that are read at once, one is read slowly, one is abandoned in the middle, and one is malformed. Every
answer is compared with that to a single client; every refusal must give its reason. Times to the first token include
the wait in the queue. Memory is the server's, sampled every second: its median in the first and in the last fifth of
the run; ``more_kept_mb`` of it are in the prefix cache. Requests run one at a time, so what is predicted is the
throughput of a single client.

Preamble: questions after the same system message, with the server's prefix cache and without, in turns. What is
predicted with it is the time to the first token of the question alone.

``measured_over_predicted`` is a ratio of speeds. The last line is JSON.
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
from typing import Any, NamedTuple

import psutil

from benchmarks.record import record

WORDS = ("heron", "sofa", "marimba", "ferry", "walnut", "hammer", "lantern", "otter", "violin", "carrot")
MALFORMED = (b"", b"{", b"[1]", b'{"messages": []}', b'{"messages": 3}', b"\xff\xfe", b'{"messages": [{"role": "x"}]}')
PATH = "/v1/chat/completions"
# The server's default.
MODEL = "demo/model"


class Answer(NamedTuple):
    """An answer that a client waited for.

    Args:
        text (str): What the model wrote.
        tokens (int): Of the text.
        first (float): Seconds to the first token.
        seconds (float): To the last token.
        cached (int): Tokens of the prompt that the prefix cache held.
    """

    text: str
    tokens: int
    first: float
    seconds: float
    cached: int


@dataclass
class Tally:
    """Results of all clients."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


class Client:
    """Sends requests to one server.

    Args:
        port (int): Of the server.
    """

    def __init__(self, port: int):
        self._port = port

    @contextmanager
    def post(self, body: bytes) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a request, and close its connection afterwards."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def kept_bytes(self) -> float:
        """Return the bytes of the server's prefix cache."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return float(next(line.split()[1] for line in lines if line.startswith("flashmoe_prefix_bytes ")))

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """Return the answer to a conversation."""
        request = {"messages": messages, "stream": True, "max_tokens": max_tokens}
        body = json.dumps({**request, "stream_options": {"include_usage": True}}).encode()
        begin = time.perf_counter()
        text, tokens, first, cached = "", 0, 0.0, 0
        with self.post(body) as response:
            assert response.status == 200, response.read()
            for event in events(response):
                if usage := event.get("usage"):
                    tokens, cached = usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
                elif content := event["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - begin
                    text += content
        return Answer(text, tokens, first, time.perf_counter() - begin, cached)


def events(response: http.client.HTTPResponse, pause: float = 0) -> Iterator[dict[str, Any]]:
    """Yield the JSON of a stream's events.

    Raises:
        ConnectionError: The stream ended before it was complete.
    """
    for line in response:
        time.sleep(pause)
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            event: dict[str, Any] = json.loads(line[6:])
            yield event
        elif line.startswith(b"data: "):
            return
    raise ConnectionError("a stream ended without [DONE]")


@contextmanager
def serve(*options: str) -> Iterator[tuple[Client, psutil.Process]]:
    """Run a server in a process of its own, and yield a client and the process.

    Raises:
        RuntimeError: It did not start.
    """
    command = [sys.executable, "-m", "flashmoe_mlx.server", "--port", "0", "--log-level", "ERROR", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("listening on "):
                yield Client(int(line.rpartition(":")[2].partition("/")[0])), psutil.Process(process.pid)
                break
        else:
            raise RuntimeError("the server did not start: run python -m flashmoe_mlx.server to see why")
    finally:
        process.terminate()
        process.wait(60)


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is a {word}?"}]


def ask(client: Client, chance: random.Random, expected: dict[str, str], tally: Tally) -> None:
    """Send one request, of a random kind."""
    kind = chance.choices(("read", "read slowly", "abandoned", "malformed"), (7, 1, 1, 1))[0]
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
                if kind == "abandoned" and tokens == 5:
                    break
        if not (expected[word].startswith(text) if kind == "abandoned" else text == expected[word]):
            tally.wrong.append(f"{word}: {text}")
        tally.tokens += tokens
        tally.outcomes[kind] += 1


def load(clients: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a run with many clients."""
    tally = Tally()
    resident: list[int] = []
    with serve("--max-queue", str(clients // 2)) as (client, process):
        answers = {word: client.answer(question(word), 60) for word in WORDS}
        expected = {word: answer.text for word, answer in answers.items()}
        # The first one warms up.
        single = list(answers.values())[1:]
        predicted = sum(answer.tokens for answer in single) / sum(answer.seconds for answer in single)
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
        assert client.answer(question("heron"), 60).text == expected["heron"]
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
        "left": tally.outcomes["abandoned"],
        "read_slowly": tally.outcomes["read slowly"],
        "ttft_p50": round(percentiles[9], 2),
        "ttft_p95": round(percentiles[18], 2),
        "tps": round(tally.tokens / elapsed, 1),
        "predicted_tps": round(predicted, 1),
        "measured_over_predicted": round(tally.tokens / elapsed / predicted, 3),
        "first_mb": round(median(resident[:part]) / 1e6, 1),
        "last_mb": round(median(resident[-part:]) / 1e6, 1),
        "more_kept_mb": round(kept / 1e6, 1),
    }


def preamble(tokens: int, rounds: int) -> dict[str, Any]:
    """Return the figures of questions after a long system message."""
    system = {"role": "system", "content": "You are a pocket dictionary. " * (tokens // 7)}
    hits, misses, alone = [], [], []
    with serve() as (cached, _), serve("--prompt-cache-bytes", "0") as (uncached, _):
        cold = cached.answer([system, *question("otter")], 2).first
        for word in WORDS[:rounds]:
            hit, miss = (client.answer([system, *question(word)], 12) for client in (cached, uncached))
            if not hit.cached:
                raise SystemExit(f"a preamble of {tokens} tokens was not cached: ask for a longer one")
            assert not miss.cached and hit.text == miss.text
            hits.append(hit.first)
            misses.append(miss.first)
            alone.append(uncached.answer(question(word), 2).first)
    return {
        "first_ttft": round(cold, 2),
        "ttft_with": round(median(hits), 3),
        "ttft_without": round(median(misses), 2),
        "ratio": round(median(miss / hit for hit, miss in zip(hits, misses, strict=True)), 1),
        "predicted_ttft_with": round(median(alone), 3),
        "measured_over_predicted": round(median(short / hit for hit, short in zip(hits, alone, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help="measure load, with that many clients")
    parser.add_argument("--seconds", type=float, default=60, help="of load (default: %(default)s)")
    parser.add_argument("--preamble", type=int, metavar="TOKENS", help="measure a system message of about that length")
    parser.add_argument("--rounds", type=int, default=3, help="questions after it (default: %(default)s)")
    parser.add_argument(
        "--record", action="store_true", help="append the figures to results/server_load.csv and server_preamble.csv"
    )
    args = parser.parse_args()
    if not args.clients and not args.preamble:
        parser.error("nothing to measure: give --clients, --preamble or both")
    figures: dict[str, Any] = {}
    if args.clients:
        run = figures["load"] = load(args.clients, args.seconds)
        print(
            f"load: {run['tps']} tok/s, predicted {run['predicted_tps']}, measured / predicted "
            f"{run['measured_over_predicted']:.2f}; {run['requests']} requests, {run['wrong']} wrong, "
            f"{run['ttft_p50']} s to the first token (median)"
        )
    if args.preamble:
        run = figures["preamble"] = {"tokens": args.preamble, **preamble(args.preamble, args.rounds)}
        print(
            f"preamble: {run['ttft_with']} s to the first token, predicted {run['predicted_ttft_with']}, measured / "
            f"predicted {run['measured_over_predicted']:.2f}; {run['ttft_without']} s without the prefix cache"
        )
    if args.record:
        for name, line in figures.items():
            record(f"server_{name}", {"model": MODEL, **line})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
