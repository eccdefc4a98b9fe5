"""What the server has done, in Prometheus' text format."""

import threading
from collections import Counter
from collections.abc import Mapping

from flashmoe_mlx.streaming.counters import Counters

_HELP = {
    "requests": "Requests answered, by route and HTTP status.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_prompt_tokens": "Tokens of prompts whose state was kept from earlier requests.",
    "generated_tokens": "Tokens of answers.",
    "generation_errors": "Answers that ended with an error.",
    "cancelled": "Answers that nobody waited for any more.",
    "first_token_seconds": "Time from a request to its first token.",
    "generation_seconds": "Time that the model worked on requests.",
    "waiting_requests": "Requests that wait for their turn.",
    "running_requests": "Requests that the model works on.",
    "prefix_bytes": "Memory for the state of prompts that may come again.",
    "expert_hits": "Experts that were needed and in memory.",
    "expert_misses": "Experts that had to be read.",
    "expert_hit_rate": "Share of experts that were in memory.",
    "expert_evictions": "Experts that had to leave memory for others.",
    "expert_bytes_read": "Bytes of experts read from the checkpoint.",
    "expert_read_seconds": "Time spent waiting for these reads.",
}


class Metrics:
    """Counts that only grow. Threads may add to them at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: Counter[str] = Counter()

    def request(self, route: str, status: int) -> None:
        """Count an answer of HTTP."""
        with self._lock:
            self._requests[route, status] += 1

    def add(self, **amounts: float) -> None:
        """Add to totals, by their names."""
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount  # type: ignore[assignment]

    def text(self, counters: Counters, gauges: Mapping[str, float]) -> str:
        """All of it as text.

        Args:
            counters (Counters): the model's.
            gauges (Mapping[str, float]): what goes up and down, by name.
        """
        with self._lock:
            requests, totals = dict(self._requests), dict(self._totals)
        experts = {
            "expert_hits": counters.hits,
            "expert_misses": counters.misses,
            "expert_evictions": counters.evictions,
            "expert_bytes_read": counters.bytes_read,
            "expert_read_seconds": counters.read_seconds,
        }
        gauges = {**gauges, "expert_hit_rate": counters.hits / max(1, counters.hits + counters.misses)}
        lines = _head("requests_total", "requests", "counter")
        lines += [
            f'flashmoe_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(requests.items())
        ]
        for name in [name for name in _HELP if name != "requests" and name not in gauges]:
            value = experts[name] if name in experts else totals.get(name, 0)
            lines += [*_head(f"{name}_total", name, "counter"), f"flashmoe_{name}_total {value}"]
        for name, value in gauges.items():
            lines += [*_head(name, name, "gauge"), f"flashmoe_{name} {value}"]
        return "\n".join(lines) + "\n"


def _head(metric: str, name: str, kind: str) -> list[str]:
    return [f"# HELP flashmoe_{metric} {_HELP[name]}", f"# TYPE flashmoe_{metric} {kind}"]
