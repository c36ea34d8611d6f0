"""Reads how much memory a process may still take. Imports no torch: the API process reads it too."""

from __future__ import annotations

import resource
from pathlib import Path

CONTROL_GROUPS = Path("sys/fs/cgroup")
# Of each version of control groups: where they are mounted, and the files of limit, use and statistics.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_machine(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take of the machine's memory: the least of what the kernel has
    (MemAvailable), of what its control groups (version 1 or 2) leave, and of what its limit on address space
    (`ulimit -v`) leaves. None where nobody says. root: where /proc and /sys are."""
    known = [_available(root), *_control_groups(root), _address_space(root)]
    return min((max(0, size) for size in known if size is not None), default=None)


def _available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _control_groups(root: Path) -> list[int | None]:
    """What each group leaves that this process is in, and each group around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, files = [CONTROL_GROUPS, CONTROL_GROUPS / "unified"], VERSION_2
        elif "memory" in controllers.split(","):
            mounts, files = [CONTROL_GROUPS / "memory"], VERSION_1
        else:
            continue
        # A container may see its own group as the mount's root while `path` is the host's: the folders then lack.
        inside = Path(path.strip("/"))
        left += [_left(root / mount / group, *files) for mount in mounts for group in (inside, *inside.parents)]
    return left


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """A group's limit less its use; pages of files that nobody has used lately are given back on demand."""
    try:
        size = int((group / limit).read_text())  # "max" in version 2 is no number
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return size - int((group / used).read_text()) + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):
        return None


def _address_space(root: Path) -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
