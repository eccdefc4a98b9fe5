"""Counters and gauges of the server, in Prometheus' text format."""

import threading
from collections import Counter
from collections.abc import Mapping

from flashmoe_mlx.streaming.counters import Counters

_HELP = {
    "requests": "HTTP requests answered, by route and status.",
    "prompt_tokens": "Prompt tokens of all requests.",
    "cached_prompt_tokens": "Prompt tokens whose state was in the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "generation_errors": "Requests whose generation failed.",
    "cancelled": "Requests whose client disconnected before the answer was complete.",
    "first_token_seconds": "Time from the arrival of a request to its first token, summed over requests.",
    "generation_seconds": "Time the model spent on requests, prefill included.",
    "waiting_requests": "Requests in the queue.",
    "running_requests": "Requests being generated.",
    "prefix_bytes": "Memory used by the prefix cache, in bytes.",
    "expert_hits": "Experts needed that were resident.",
    "expert_misses": "Experts needed that had to be read.",
    "expert_hit_rate": "Share of the experts needed that were resident.",
    "expert_evictions": "Experts evicted from memory.",
    "expert_bytes_read": "Bytes of experts read from the checkpoint.",
    "expert_read_seconds": "Time spent waiting for expert reads.",
}


class Metrics:
    """Thread-safe counters, and their text for a scrape."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: Counter[str] = Counter()

    def count_request(self, route: str, status: int) -> None:
        """Count one answered HTTP request."""
        with self._lock:
            self._requests[route, status] += 1

    def add(self, **amounts: float) -> None:
        """Increase counters, given by their names."""
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount  # type: ignore[assignment]

    def text(self, counters: Counters, gauges: Mapping[str, float]) -> str:
        """Return all metrics in Prometheus' text format.

        Args:
            counters (Counters): The model's expert counters.
            gauges (Mapping[str, float]): Current values by name.
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
