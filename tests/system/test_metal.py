"""Metal's limits, as MLX reports them on a Mac."""

import os
import platform
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx.system.metal import (
    computes_on_metal,
    has_neural_accelerators,
    max_buffer_nbytes,
    metal_room,
    wire,
)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Mac that computes on its GPU; the dictionary is its device_info."""
    info: dict[str, Any] = {"architecture": "applegpu_g16s", "max_recommended_working_set_size": 36 * 10**9}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    return info


def test_a_mac_may_compute_on_its_cpu(mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert computes_on_metal()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not computes_on_metal()


def test_without_metal_nothing_is_limited() -> None:
    assert not computes_on_metal()
    assert metal_room() == max_buffer_nbytes() == sys.maxsize


def test_limit_of_a_buffer(mac: dict[str, Any]) -> None:
    mac["max_buffer_length"] = 28 * 10**9
    assert max_buffer_nbytes() == 28 * 10**9


@pytest.mark.parametrize(
    ("architecture", "macos", "has"),
    [
        ("applegpu_g16s", "26.2", False),
        ("applegpu_g17s", "26.2", True),
        ("applegpu_g17g", "27.0.1", True),
        ("applegpu_g17s", "26.1.1", False),
        ("applegpu_g17s", "15", False),
        ("applegpu_g17p", "26.2", False),
        ("applegpu_g18p", "26.2", True),
        ("", "26.2", False),
    ],
)
def test_neural_accelerators(
    architecture: str, macos: str, has: bool, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac["architecture"] = architecture
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert has_neural_accelerators() == has
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not has_neural_accelerators()


def test_wired_limit_is_cut_to_the_recommendation_and_never_lowered(
    mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [0]
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.append(limit) or limits[-2])
    wire(26 * 10**9)
    assert limits[1:] == [26 * 10**9]
    wire(20 * 10**9)
    assert limits[-1] == 26 * 10**9
    wire(40 * 10**9)
    assert limits[-1] == 36 * 10**9
    count = len(limits)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    wire(36 * 10**9)
    assert len(limits) == count


@pytest.mark.parametrize(
    ("system", "given", "value"), [("darwin", None, "1000"), ("darwin", "50", "50"), ("linux", None, "None")]
)
def test_command_buffers_are_not_cut_by_slots(system: str, given: str | None, value: str) -> None:
    """On a Mac, and only if the user has not chosen; before MLX is imported, which reads it when it starts."""
    program = f"import os, sys; sys.platform = {system!r}; import flashmoe_mlx; assert 'mlx.core' not in sys.modules; "
    program += "print(os.environ.get('MLX_MAX_MB_PER_BUFFER'))"
    environment = {name: text for name, text in os.environ.items() if name != "MLX_MAX_MB_PER_BUFFER"}
    if given is not None:
        environment["MLX_MAX_MB_PER_BUFFER"] = given
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip() == value
