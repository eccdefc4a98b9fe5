"""The kit for a Mac's owner: sections run or say why not, and the page names what a machine contradicts."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks import mac, mac_sections
from benchmarks.mac_report import findings, page
from benchmarks.mac_sections import SECTIONS, NotRun, Section, Settings
from flashmoe_mlx.config import Config
from flashmoe_mlx.ops import gpu

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            900000.
Pages inactive:                          890000.
Pages speculative:                         5000.
Pages wired down:                        250000.
Pages purgeable:                           3000.
"Translation faults":                 987654321.
File-backed pages:                       600000.
Anonymous pages:                        1195000.
Pages stored in compressor:                   0.
"""

WAYS = {
    name: {"ms_per_token": ms, "read_ms": 1.0, "router_ms": 1.0, "other_ms": ms - 2, "same_tokens": True}
    for name, ms in (("live", 20.0), ("copied", 15.0))
}


def contradictions(section: str, figures: dict[str, Any]) -> list[str]:
    results = {section: figures | {"section_seconds": 1.0}}
    return [finding.text for _, finding in findings(results) if finding.contradicts]


@pytest.mark.parametrize(
    ("section", "good", "bad", "word"),
    [
        ("reads", {"gbps": {"8": 5.0, "16": 6.0}}, {"gbps": {"8": 6.4, "16": 6.0}}, "--read-threads 8"),
        ("slots", {"default": "copied"}, {"default": "live"}, "slots = copied is 1.33 times as fast"),
        ("max_mb", {"default": "1000"}, {"default": "unset"}, "1000 is faster"),
        ("exact", {"exact": True}, {"exact": False}, "not as exact"),
        ("visibility", {"stale": 0}, {"stale": 2}, "2 of 9 writes"),
        ("requests", {"first_token_ms": [30, 11, 12]}, {"first_token_ms": [30, 11, 25]}, "twice as long"),
        ("kernel_tests", {"tests": {"bfloat16": {"ok": True, "result": "9", "failed": []}}}, {}, "FAILED a"),
        ("registers", {"kernels": {"combine": {"allowed": 512}}}, {"kernels": {"combine": {"allowed": 448}}}, "448"),
        ("readback", {"Shared": {"ms_per_token": 9}}, {"Shared": {"ms_per_token": 11}}, "event is faster"),
        ("launches", {"lines": [{"ratio": 0.5}]}, {"lines": [{"ratio": 1.2}]}, "fused is slower"),
        ("memory", {"before": {"ours_gb": 20.0}}, {"before": {"ours_gb": 11.0}}, "20.00 were expected"),
    ],
)
def test_the_page_names_what_contradicts_a_default(
    section: str, good: dict[str, Any], bad: dict[str, Any], word: str
) -> None:
    common: dict[str, dict[str, Any]] = {
        "reads": {"cold": True, "default": "16"},
        "slots": {"ways": WAYS},
        "max_mb": {"tps": {"50": 58.0, "1000": 91.0}},
        "visibility": {"rounds": 9},
        "kernel_tests": {"tests": {"bfloat16": {"ok": False, "result": "1 failed", "failed": ["FAILED a"]}}},
    }

    def whole(figures: dict[str, Any]) -> dict[str, Any]:
        figures = common.get(section, {}) | figures
        if section == "registers":
            entry = {"threads": 512, "registers_16_bit": 208}
            return {"kernels": {name: entry | each for name, each in figures["kernels"].items()}}
        if section == "readback":
            ways = {"event": {"ms_per_token": 10.0}} | figures
            return {"ways": {name: {"wait_us_per_layer": 200} | each for name, each in ways.items()}}
        if section == "launches":
            line = {"kind": "attention", "way": "fused", "us": 90, "launches": 12}
            return {"operation_us": 2.5, "lines": [line | each for each in figures["lines"]]}
        if section == "memory":
            each = {"psutil_gb": 12.0, "kernel_gb": 21.0} | figures["before"]
            return {"before": each, "after_reading_the_checkpoint": each, "reserve_gb": 1.0}
        return figures

    assert contradictions(section, whole(good)) == []
    assert any(word in text for text in contradictions(section, whole(bad)))


def test_a_setting_that_changes_tokens_is_named() -> None:
    changed = {name: each | {"same_tokens": name == "live"} for name, each in WAYS.items()}
    assert any("changes the tokens" in text for text in contradictions("slots", {"default": "copied", "ways": changed}))


def test_the_page_tells_what_failed_and_what_was_not_run() -> None:
    text = page({"slots": {"not_run": "not in this version"}, "decode": {"failed": "took longer than 240 s"}})
    against, _, rest = text.partition("## What was measured")
    assert "- decode: failed: took longer than 240 s" in against
    assert "- slots: not in this version" in rest


def test_vm_stat_counts_free_purgeable_and_file_backed_pages() -> None:
    assert mac_sections.reclaimable(VM_STAT) == (10_000 + 600_000 + 3_000) * 16384


def test_a_probe_finds_the_limit_of_each_kernel_and_launches_it_as_asked() -> None:
    launched: list[int] = []

    def compiled(kernel: gpu.Kernel) -> Callable[..., list[mx.array]]:
        def launch(*, threadgroup: tuple[int, int, int], **arguments: Any) -> list[mx.array]:
            if threadgroup[0] > 448:
                raise ValueError(
                    f"Thread group size ({threadgroup[0]}) is greater than  the maximum allowed threads per "
                    "threadgroup (448)."
                )
            launched.append(threadgroup[0])
            return [mx.zeros((1,))]

        return launch

    found: dict[str, dict[str, Any]] = {}
    launch = mac_sections.probing(compiled, found)(gpu.Kernel("combine", ("x",), ""))
    for _ in range(2):
        launch(inputs=[], threadgroup=(384, 1, 1), template=[("TOP_K", 10)])
    assert launched == [384, 384]
    assert found == {"combine<TOP_K=10>": {"threads": 384, "allowed": 448, "registers_16_bit": 232}}


def test_a_kernel_that_does_not_build_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(kernel: gpu.Kernel) -> Callable[..., list[mx.array]]:
        def launch(**arguments: Any) -> list[mx.array]:
            if arguments["threadgroup"][0] == mac_sections.TOO_MANY_THREADS:
                raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: x")
            return []

        return launch

    found: dict[str, dict[str, Any]] = {}
    mac_sections.probing(compiled, found)(gpu.Kernel("route", ("x",), ""))(threadgroup=(64, 1, 1))
    assert found["route<>"]["error"] == "[metal::Device] Unable to build metal library from source"
    assert contradictions("registers", {"kernels": found})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    quick = Settings(tmp_path_factory.mktemp("mac"), "small", 4, 1, 100)
    assert mac_sections.checkpoint(quick)["experts"] == 16
    return quick


@pytest.mark.parametrize("name", ["visibility", "memory", "readback", "requests", "lookahead", "max_mb"])
def test_a_section_measures_here_what_it_measures_on_a_mac(name: str, settings: Settings) -> None:
    if name == "memory" and sys.platform == "darwin" and not shutil.which("vm_stat"):
        pytest.skip("no vm_stat")
    figures = SECTIONS[name].run(settings)
    assert not contradictions("visibility", figures) if name == "visibility" else True
    # The page can be made of its figures, and JSON too.
    assert list(findings({name: json.loads(json.dumps(figures | {"section_seconds": 1.0}))}))


def test_ways_are_compared_with_all_experts_in_memory_too(settings: Settings) -> None:
    figures = mac_sections.compare(settings, {"a": Config(), "b": Config(lookahead=True)}, share=1, cold=False)
    assert [each["read_ms"] for each in figures.values()] == [0, 0]
    assert all(each["same_tokens"] for each in figures.values())


def test_what_only_metal_has_is_not_run_here() -> None:
    with pytest.raises(NotRun, match="needs an Apple GPU"):
        SECTIONS["registers"].refuse_elsewhere()
    with pytest.raises(NotRun, match="not in this version"):
        mac_sections.choices("not_invented_yet")(Settings(Path()))


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("print('{\"a\": 1}')", {"a": 1}),
        ("import sys; sys.exit('[metal] it broke')", {"failed": "[metal] it broke"}),
        ("import os; os.abort()", {"failed": "ended with code -6"}),
        ("import time; time.sleep(60)", {"failed": "took longer than 2 s"}),
    ],
)
def test_a_section_that_ends_badly_takes_nothing_with_it(
    program: str, outcome: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = subprocess.run
    monkeypatch.setattr(mac.subprocess, "run", lambda _, **how: run([sys.executable, "-c", program], **how))
    monkeypatch.setitem(SECTIONS, "exact", Section(dict, 2, decodes=False))
    figures = mac.run_section("exact", Settings(tmp_path), [], 60)
    assert figures | outcome == figures


def test_what_decodes_needs_the_checkpoint_and_time(tmp_path: Path) -> None:
    assert mac.run_section("slots", Settings(tmp_path), [], 60) == {"not_run": "needs the checkpoint"}
    assert mac.run_section("exact", Settings(tmp_path), [], 1) == {"not_run": "the 15 minutes are over"}
