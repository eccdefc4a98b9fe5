"""The page that ``benchmarks.mac`` writes: plain sentences, and the defaults that a machine contradicts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# Differences below this share are noise.
NOISE = 0.05


class Finding(NamedTuple):
    """A sentence about a machine.

    Args:
        text (str): The sentence.
        contradicts (bool): A default or a promise does not hold on this machine.
    """

    text: str
    contradicts: bool = False


def findings(results: Mapping[str, Any]) -> Iterator[tuple[str, Finding]]:
    """Yield the findings of each section with figures.

    Args:
        results (Mapping): For each section its figures, or ``{"not_run": reason}`` or ``{"failed": reason}``.
    """
    for name, figures in results.items():
        if "failed" in figures:
            yield name, Finding(f"failed: {figures['failed']}", True)
        elif "not_run" not in figures and name in _READERS:
            yield from ((name, finding) for finding in _READERS[name](figures))


def page(results: Mapping[str, Any]) -> str:
    """Return the page in Markdown."""
    found = list(findings(results))
    against = [(name, finding) for name, finding in found if finding.contradicts]
    lines = ["# This machine", "", _machine(results.get("machine", {})), ""]
    lines += ["## What it contradicts", ""]
    lines += [f"- {name}: {finding.text}" for name, finding in against] or ["Nothing that was measured."]
    lines += ["", "## What was measured", ""]
    lines += [f"- {name}: {finding.text}" for name, finding in found if not finding.contradicts]
    skipped = {name: figures["not_run"] for name, figures in results.items() if "not_run" in figures}
    if skipped:
        lines += ["", "## Not run", "", *(f"- {name}: {reason}" for name, reason in skipped.items())]
    return "\n".join(lines) + "\n"


def _machine(figures: Mapping[str, Any]) -> str:
    if "chip" not in figures:
        return "Unknown."
    parts = (figures["chip"], figures["model"], f"{figures['cores']} cores", f"{figures['memory_gb']} GB")
    device = "the Apple GPU" if figures["metal"] else "another device than an Apple GPU"
    text = ", ".join(part for part in (*parts, figures["system"]) if part)
    text += f". MLX {figures['versions']['mlx']} computes on {device}."
    if figures["on_battery"]:
        text += " It ran on battery: plug in and run again, because speed and one default depend on it."
    if figures["quick"]:
        text += " Settings were quick: the figures mean little."
    return text


def _kernel_tests(figures: Mapping[str, Any]) -> Iterator[Finding]:
    for name, each in figures["tests"].items():
        failed = "; ".join(each["failed"][:3])
        yield Finding(f"{name} kernels: {each['result']}" + (f" ({failed})" if failed else ""), not each["ok"])


def _registers(figures: Mapping[str, Any]) -> Iterator[Finding]:
    for name, each in figures["kernels"].items():
        if "error" in each:
            yield Finding(f"{name} does not build or launch: {each['error']}", True)
        else:
            text = f"{name} asks for {each['threads']} threads, and Metal allows {each['allowed']}"
            if each["registers_16_bit"]:
                text += f", so a thread has at most {each['registers_16_bit'] // 2} registers of 32 bits"
            yield Finding(text, each["threads"] > each["allowed"])


def _exact(figures: Mapping[str, Any]) -> Iterator[Finding]:
    differs = "" if figures["exact"] else " not"
    yield Finding(f"the demo model is{differs} as exact as mlx-lm's", not figures["exact"])


def _visibility(figures: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding(
        f"{figures['stale']} of {figures['rounds']} writes of the host to a row next to one that was being read were "
        "not seen by the device",
        figures["stale"] > 0,
    )


def _memory(figures: Mapping[str, Any]) -> Iterator[Finding]:
    limit = figures.get("max_recommended_working_set_size_gb", float("inf"))
    for when in ("before", "after_reading_the_checkpoint"):
        each = figures[when]
        text = f"{when.replace('_', ' ')}, {each['ours_gb']} GB are available for us, {each['psutil_gb']} by psutil"
        if "kernel_gb" not in each:
            yield Finding(text)
            continue
        wanted = min(limit, each["kernel_gb"] - figures["reserve_gb"])
        text += f", {each['kernel_gb']} by vm_stat, {limit} allowed by Metal: {wanted:.2f} were expected"
        # Other programs allocate between two questions.
        yield Finding(text, abs(each["ours_gb"] - wanted) > max(0.5, 2 * NOISE * wanted))


def _reads(figures: Mapping[str, Any]) -> Iterator[Finding]:
    gbps, default = figures["gbps"], figures["default"]
    best = max(gbps, key=gbps.__getitem__)
    where = "the disk" if figures["cold"] else "the page cache"
    text = f"from {where}: " + ", ".join(f"{value} GB/s with {threads} in flight" for threads, value in gbps.items())
    other = default in gbps and gbps[best] > (1 + NOISE) * gbps[default]
    if other:
        text += f"; --read-threads {best} is faster than the default, {default}"
    yield Finding(text, other)


def _choices(name: str) -> Callable[[Mapping[str, Any]], Iterator[Finding]]:
    def read(figures: Mapping[str, Any]) -> Iterator[Finding]:
        ways, default = figures["ways"], figures["default"]
        for value, each in ways.items():
            where = "the disk" if figures.get("cold") else "memory"
            text = (
                f"{name} = {value}, from {where}: {each['ms_per_token']} ms a token, {each['read_ms']} of them waiting "
                f"for reads and {each['router_ms']} for routers, {each['other_ms']} of the rest"
            )
            # Kernels round differently from MLX's own operations.
            changed = not each["same_tokens"] and name != "kernels"
            yield Finding(text + ("; it changes the tokens" if changed else ""), changed)
        best = min(ways, key=lambda value: ways[value]["ms_per_token"])
        if default in ways and ways[best]["ms_per_token"] < (1 - NOISE) * ways[default]["ms_per_token"]:
            share = ways[default]["ms_per_token"] / ways[best]["ms_per_token"]
            yield Finding(f"{name} = {best} is {share:.2f} times as fast as the default, {default}", True)

    return read


def _max_mb(figures: Mapping[str, Any]) -> Iterator[Finding]:
    tps, default = figures["tps"], figures["default"]
    text = ", ".join(f"{value} tok/s with MLX_MAX_MB_PER_BUFFER={mb}" for mb, value in tps.items())
    small, large = tps
    # Unset is MLX's own, which is the small one.
    chosen, other = (large, small) if default not in ("unset", small) else (small, large)
    wrong = tps[other] > (1 + NOISE) * tps[chosen]
    yield Finding(f"{text}; this version has it {default}" + (f", and {other} is faster" if wrong else ""), wrong)


def _readback(figures: Mapping[str, Any]) -> Iterator[Finding]:
    ways = figures["ways"]
    text = "; ".join(
        f"{name}: {each['wait_us_per_layer']} us a layer, {each['ms_per_token']} ms a token"
        for name, each in ways.items()
    )
    others = [each["ms_per_token"] for name, each in ways.items() if name != "event"]
    wrong = bool(others) and min(others) > (1 + NOISE) * ways["event"]["ms_per_token"]
    yield Finding(text + ("; MLX's event is faster than the way that this version prefers" if wrong else ""), wrong)


def _requests(figures: Mapping[str, Any]) -> Iterator[Finding]:
    times = figures["first_token_ms"]
    slow = max(times[1:]) > 2 * min(times)
    text = f"first tokens of {len(times)} requests in a row after {', '.join(map(str, times))} ms"
    yield Finding(text + ("; a later one took twice as long" if slow else ""), slow)


def _launches(figures: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding(f"an operation takes {figures['operation_us']} us to build and launch")
    for line in figures["lines"]:
        slower = line["way"] == "fused" and line["ratio"] > 1 + NOISE
        text = f"{line['kind']}, {line['way']}: {line['us']} us a layer in {line['launches']} launches"
        yield Finding(text + ("; fused is slower than mlx-lm's code" if slower else ""), slower)


def _decode(figures: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding(f"mlx-lm, all experts in memory: {figures['resident_tps']} tok/s")
    for run in figures["runs"]:
        yield Finding(
            f"budget {run['budget']:.0%}: {run['tps']} tok/s, where bytes and bandwidth predict {run['predicted_tps']}"
        )


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Finding]]] = {
    "kernel_tests": _kernel_tests,
    "registers": _registers,
    "exact": _exact,
    "visibility": _visibility,
    "memory": _memory,
    "reads": _reads,
    "max_mb": _max_mb,
    "readback": _readback,
    "requests": _requests,
    "launches": _launches,
    "decode": _decode,
    **{name: _choices(name) for name in ("slots", "keep_warm", "kernels", "lookahead")},
}
