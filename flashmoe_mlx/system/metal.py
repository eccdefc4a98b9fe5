"""Limits of Metal: memory in all, of one buffer, and wired."""

import platform
import re
import sys

import mlx.core as mx


def computes_on_metal() -> bool:
    """Return whether MLX computes on an Apple GPU. A Mac may also compute on its CPU."""
    return bool(mx.default_device().type == mx.gpu and mx.metal.is_available())


def metal_room() -> int:
    """Return the bytes that Metal lets this program keep besides the arrays there are; without Metal, no limit."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return sys.maxsize if limit is None else max(0, int(limit) - mx.get_active_memory())


def max_buffer_nbytes() -> int:
    """Return the bytes that one array can have; without Metal, no limit."""
    return int(mx.device_info().get("max_buffer_length", sys.maxsize))


def has_neural_accelerators() -> bool:
    """Return whether MLX uses the matrix units of M5 and later: GPU generation 17, macOS 26.2."""
    # As "applegpu_g17s". Phones have "p", and matrix units a generation later.
    found = re.fullmatch(r"applegpu_g(\d+)([a-z])", str(mx.device_info().get("architecture", "")))
    if found is None or not computes_on_metal():
        return False
    macos = tuple(int(part) for part in re.findall(r"\d+", platform.mac_ver()[0])[:2])
    return int(found[1]) >= (18 if found[2] == "p" else 17) and macos >= (26, 2)


def wire(nbytes: int) -> None:
    """Let Metal keep arrays of up to that many bytes wired, so that macOS cannot swap them out between two tokens.

    Args:
        nbytes (int): Cut to what Metal recommends. A higher limit that somebody else set stays.
    """
    if not computes_on_metal():
        return
    limit = min(nbytes, int(mx.device_info()["max_recommended_working_set_size"]))
    if (before := mx.set_wired_limit(limit)) > limit:
        mx.set_wired_limit(before)
