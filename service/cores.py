"""How many cores there are, and who waits for whom where the engine and the service share them.

The engine's threads work through a pass in small tasks, and each waits for the other's last one. A process that wakes
up and takes a core in the middle of a task stops them all. So everything around an engine on a CPU gives way: it does
not push a running thread aside when it wakes, and the engine offers its cores between tasks (EngineConfig.share_cores).
Shares of the processor stay as they were. Linux only; elsewhere nothing changes.
"""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own, as it sees it


def available(group: Path = CONTROL_GROUP) -> int:
    """Cores that this process may keep busy, at least one: of those that it may run on, what its container's quota of
    processor time allows. A thread more than that would be stopped in every period."""
    cores = len(os.sched_getaffinity(0))
    try:
        if (file := group / "cpu.max").exists():  # version 2: "200000 100000", or "max 100000"
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no control groups, or none that can be read
    return max(1, cores)


def give_way() -> None:
    """The calling thread, and what it starts from now on, no longer pushes a running thread aside when it wakes."""
    _schedule("SCHED_BATCH")


def take_part() -> None:
    """The calling thread is scheduled as any other again: the engine's, whose parent gives way."""
    _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    if hasattr(os, policy):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
