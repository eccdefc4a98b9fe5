"""Memory limits of a container: the control groups of Linux, versions 1 and 2."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# By the type of the file system: the files with limits, the file with the usage, and the line of memory.stat with the
# page cache that the kernel reclaims first. Above memory.high it reclaims so hard that processes hardly run.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}

# The kernel's way to say that version 1 has no limit is the largest number of whole pages.
_UNLIMITED = 1 << 60


class MemoryLimit(NamedTuple):
    """Memory that the control groups of this process leave it.

    Args:
        total (int): The smallest limit, in bytes.
        available (int): The bytes that can be allocated before a limit is reached. Page cache that has not been used
            lately counts as available, as it does for a machine.
    """

    total: int
    available: int


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the limit of this process, or ``None`` if there is none.

    Control groups are nested, and each may have a limit: the smallest one along the path counts.

    Args:
        root (Path): The folder that has ``proc`` and ``sys``. Default: ``/``.
    """
    limits = [limit for folder, kind in _groups(root) if (limit := _limit(folder, kind)) is not None]
    if not limits:
        return None
    return MemoryLimit(min(limit.total for limit in limits), min(limit.available for limit in limits))


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process's groups, from its own up to the outermost one that is visible."""
    paths = dict(_paths(_read(root / "proc/self/cgroup")))
    # Fields: id, parent, device, root of the mount, mount point, options, ..., "-", type, source, options.
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = (part.split() for part in line.partition(" - "))
        if len(mount) < 5 or len(filesystem) < 3:
            continue
        kind, options = filesystem[0], filesystem[2].split(",")
        if kind in paths and (kind == "cgroup2" or "memory" in options):
            top = root / _unescape(mount[4]).lstrip("/")
            # A container may see its own group as the root, and not the groups above it.
            inside = Path(paths[kind])
            beginning = Path(_unescape(mount[3]))
            relative = inside.relative_to(beginning) if inside.is_relative_to(beginning) else Path()
            folder = top / relative
            for each in (folder, *folder.parents):
                yield each, kind
                if each == top:
                    break


def _paths(text: str) -> Iterator[tuple[str, str]]:
    """Yield the path of the process's group in each version, by the type of its file system."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _limit(folder: Path, kind: str) -> MemoryLimit | None:
    """Return the limit of one group, or ``None`` if it has none."""
    names, usage, reclaimable = _FILES[kind]
    limits = [int(text) for name in names if (text := _read(folder / name).strip()).isdigit()]
    total = min(limits, default=_UNLIMITED)
    if total >= _UNLIMITED:
        return None
    statistics = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    used = int(_read(folder / usage).strip() or 0) - int(statistics.get(reclaimable, 0))
    return MemoryLimit(total, max(0, total - max(0, used)))


def _read(file: Path) -> str:
    """Return the text of a file, which is empty on other systems and where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unescape(path: str) -> str:
    """Return a path of mountinfo, where a space is ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
