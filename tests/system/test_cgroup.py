"""Memory limits of containers, in fake folders ``proc`` and ``sys``."""

from pathlib import Path

import psutil
import pytest

from flashmoe_mlx.system.cgroup import MemoryLimit, memory_limit
from flashmoe_mlx.system.memory import available_memory, total_memory

GB = 10**9
# What version 1 shows where there is no limit.
UNLIMITED = 9223372036854771712
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)


def machine(root: Path, cgroup: str, mounts: str, groups: dict[str, dict[str, object]]) -> Path:
    """Write what Linux shows of control groups.

    Args:
        root (Path): The folder to write to.
        cgroup (str): /proc/self/cgroup.
        mounts (str): /proc/self/mountinfo.
        groups (dict): By the path of a group's folder, the content of its files.
    """
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}
    files |= {f"{folder}/{name}": text for folder, group in groups.items() for name, text in group.items()}
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}")
    return root


def v2(limit: object, used: int = 0, cached: int = 0, **files: object) -> dict[str, object]:
    """Return the files of a group of version 2."""
    statistics = f"anon {used - cached}\nfile {cached}\nactive_file 0\ninactive_file {cached}\n"
    return {"memory.max": f"{limit}\n", "memory.current": used, "memory.stat": statistics, **files}


def v1(limit: object, used: int = 0, cached: int = 0) -> dict[str, object]:
    """Return the files of a group of version 1."""
    statistics = f"cache 7\ninactive_file 7\ntotal_cache {cached}\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": statistics}


@pytest.mark.parametrize(
    ("cgroup", "mounts", "groups", "expected"),
    [
        # A container with a namespace of its own is at the root.
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": v2(2 * GB, 500, 200)}, (2 * GB, 2 * GB - 300)),
        # A service of systemd.
        (
            "0::/system.slice/x.service\n",
            V2.format(top="/"),
            {"sys/fs/cgroup/system.slice/x.service": v2(3 * GB, 1 * GB)},
            (3 * GB, 2 * GB),
        ),
        # The limit of an outer group is the smallest.
        (
            "0::/a/b/c\n",
            V2.format(top="/"),
            {
                "sys/fs/cgroup/a/b/c": v2("max", 1 * GB),
                "sys/fs/cgroup/a/b": v2(8 * GB, 1 * GB),
                "sys/fs/cgroup/a": v2(4 * GB, 3 * GB),
            },
            (4 * GB, 1 * GB),
        ),
        # The smallest limit and the fullest group are not the same.
        (
            "0::/a/b\n",
            V2.format(top="/"),
            {"sys/fs/cgroup/a/b": v2(2 * GB, 0), "sys/fs/cgroup/a": v2(9 * GB, 8 * GB)},
            (2 * GB, 1 * GB),
        ),
        # memory.high throttles, long before memory.max kills.
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": v2(4 * GB, **{"memory.high": 1 * GB})}, (1 * GB, 1 * GB)),
        # Without a namespace, the container's group is what is mounted.
        (
            "0::/docker/abc\n",
            V2.format(top="/docker/abc"),
            {"sys/fs/cgroup": v2(2 * GB, 1 * GB, 1 * GB)},
            (2 * GB, 2 * GB),
        ),
        # More in use than the limit allows, since it was lowered.
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": v2(1 * GB, 2 * GB)}, (1 * GB, 0)),
        # A space in a mount point.
        (
            "0::/\n",
            r"30 23 0:26 / /my\040groups rw - cgroup2 cgroup rw",
            {"my groups": v2(2 * GB, 0)},
            (2 * GB, 2 * GB),
        ),
        # Version 1.
        (
            "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            V1.format(top="/"),
            {"sys/fs/cgroup/memory/docker/abc": v1(2 * GB, 500, 200), "sys/fs/cgroup/memory": v1(UNLIMITED)},
            (2 * GB, 2 * GB - 300),
        ),
        (
            "4:memory:/docker/abc\n",
            V1.format(top="/docker/abc"),
            {"sys/fs/cgroup/memory": v1(3 * GB, 1 * GB)},
            (3 * GB, 2 * GB),
        ),
        # The path is of the host, and the mount of another group: the container sees only itself.
        (
            "4:memory:/kubepods/pod1/abc\n",
            V1.format(top="/kubepods/pod1/xyz"),
            {"sys/fs/cgroup/memory": v1(3 * GB, 1 * GB)},
            (3 * GB, 2 * GB),
        ),
        # Both, as systemd mounts them: version 2 has no memory controller then.
        (
            "4:memory:/a\n0::/b\n",
            V1.format(top="/") + V2.format(top="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            {"sys/fs/cgroup/memory/a": v1(3 * GB, 1 * GB), "sys/fs/cgroup/unified/b": {"cgroup.procs": "1"}},
            (3 * GB, 2 * GB),
        ),
    ],
)
def test_the_limit_is_the_smallest_along_the_path(
    cgroup: str, mounts: str, groups: dict[str, dict[str, object]], expected: tuple[int, int], tmp_path: Path
) -> None:
    assert memory_limit(machine(tmp_path, cgroup, mounts, groups)) == MemoryLimit(*expected)


@pytest.mark.parametrize(
    ("cgroup", "mounts", "groups"),
    [
        ("", "", {}),
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": v2("max", 1 * GB)}),
        ("4:memory:/a\n", V1.format(top="/"), {"sys/fs/cgroup/memory/a": v1(UNLIMITED, 1 * GB)}),
        # The root group of a machine has no file for a limit.
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": {"memory.stat": "inactive_file 7\n"}}),
        ("0::/gone\n", V2.format(top="/"), {}),
        ("nonsense\n\n::\n", "nonsense\n - \na b c d e - x\n", {}),
        ("0::/\n", V2.format(top="/"), {"sys/fs/cgroup": {"memory.max": "nonsense"}}),
    ],
)
def test_without_a_limit_there_is_none(
    cgroup: str, mounts: str, groups: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    machine(tmp_path, cgroup, mounts, groups)
    assert memory_limit(tmp_path) is None
    assert total_memory(tmp_path) == psutil.virtual_memory().total


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "nowhere") is None


@pytest.mark.parametrize("limit", [1 << 20, 100 << 20, 1 << 62])
def test_memory_is_what_the_container_has(limit: int, tmp_path: Path) -> None:
    machine(tmp_path, "0::/\n", V2.format(top="/"), {"sys/fs/cgroup": v2(limit, 1000, 400)})
    machine_has = psutil.virtual_memory()
    assert total_memory(tmp_path) == min(limit, machine_has.total)
    if limit < machine_has.total:
        assert available_memory(tmp_path) == limit - 600
    else:
        assert 0 < available_memory(tmp_path) < machine_has.total
