"""Reads how much memory a process may still allocate. Imports no torch, since the API process reads it too."""

from __future__ import annotations

import resource
from pathlib import Path

CONTROL_GROUPS = Path("sys/fs/cgroup")
# For each version of control groups: the file of the limit, the file of the use, and the field of reclaimable bytes.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_machine(root: Path = Path("/")) -> int | None:
    """Return the bytes of the machine's memory that this process may still allocate; None if nothing is known.

    This is the least of the kernel's MemAvailable, the rest of the limits of its control groups (version 1 or 2), and
    the rest of its limit on address space (`ulimit -v`). root: the folder that contains /proc and /sys.
    """
    known = [_available(root), *_control_groups(root), _address_space(root)]
    return min((max(0, size) for size in known if size is not None), default=None)


def _available(root: Path) -> int | None:
    """Read MemAvailable from /proc/meminfo, in bytes; None if it cannot be read."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _control_groups(root: Path) -> list[int | None]:
    """Return the bytes left in each control group of this process, and in each group around it."""
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
        # In a container the mount's root may be its own group while `path` is the host's. Its folders are missing then.
        inside = Path(path.strip("/"))
        left += [_left(root / mount / group, *files) for mount in mounts for group in (inside, *inside.parents)]
    return left


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Return a group's limit less its use, in bytes; None if it has no limit. Inactive pages of files do not count as
    used, since the kernel reclaims them on demand."""
    try:
        size = int((group / limit).read_text())  # version 2 writes "max" for no limit, a ValueError
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return size - int((group / used).read_text()) + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):
        return None


def _address_space(root: Path) -> int | None:
    """Return the bytes left of this process's limit on address space; None if it has none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return limit - int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
