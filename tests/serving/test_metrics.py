"""Health and metrics."""

from tests.support.serving import HERON, Running, connected, endless, has_requests, wait_until

# Dashboards and alerts use these names.
NAMES = {
    "flashmoe_requests_total",
    "flashmoe_prompt_tokens_total",
    "flashmoe_cached_prompt_tokens_total",
    "flashmoe_generated_tokens_total",
    "flashmoe_generation_errors_total",
    "flashmoe_cancelled_total",
    "flashmoe_first_token_seconds_total",
    "flashmoe_generation_seconds_total",
    "flashmoe_expert_hits_total",
    "flashmoe_expert_misses_total",
    "flashmoe_expert_evictions_total",
    "flashmoe_expert_bytes_read_total",
    "flashmoe_expert_read_seconds_total",
    "flashmoe_waiting_requests",
    "flashmoe_running_requests",
    "flashmoe_prefix_bytes",
    "flashmoe_expert_hit_rate",
}


def scrape(running: Running) -> dict[str, float]:
    """Return the samples of a scrape by name and labels."""
    _, headers, text = running.ask("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in samples:
        assert f"# TYPE {name.partition('{')[0]} " in text
    return {name: float(value) for name, value in samples.items()}


def test_the_names_of_metrics_are_stable(running: Running) -> None:
    assert running.ask("GET", "/health")[2] == {"status": "ok"}
    assert {name.partition("{")[0] for name in scrape(running)} == NAMES


def test_an_answer_is_counted(running: Running) -> None:
    before = scrape(running)
    running.chat(messages=HERON, max_tokens=2)
    after = scrape(running)
    label = 'flashmoe_requests_total{route="/v1/chat/completions",status="200"}'
    assert after[label] == before.get(label, 0) + 1
    assert after["flashmoe_generated_tokens_total"] == before["flashmoe_generated_tokens_total"] + 2
    assert after["flashmoe_prefix_bytes"] > 0


def test_a_client_that_disconnects_is_counted(running: Running) -> None:
    before = scrape(running)["flashmoe_cancelled_total"]
    with connected(running, endless(running)):
        wait_until(has_requests(running, 1))
    wait_until(lambda: scrape(running)["flashmoe_cancelled_total"] == before + 1)
    assert scrape(running)['flashmoe_requests_total{route="/v1/chat/completions",status="499"}'] >= 1
