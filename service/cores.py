"""Count available cores, and set scheduling where engine and service share them.

The engine's threads work through a forward pass in small tasks and wait for each other after each. If another process
wakes up and preempts one of them, all are delayed. So with an engine on the CPU, all other processes use batch
scheduling, in which a thread that wakes up does not preempt a running one, and the engine yields its cores between
tasks (`EngineConfig.share_cores`). Shares of processor time stay the same. Linux only; elsewhere nothing changes.
"""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of this container, seen from within


def available(group: Path = CONTROL_GROUP) -> int:
    """Return the number of cores that this process may keep busy: its CPU affinity, limited by its container's quota.

    One thread more would be throttled in every period of the quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        if (file := group / "cpu.max").exists():  # version 2: "200000 100000", or "max 100000"
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no control groups, or unreadable ones
    return max(1, cores)


def set_batch_scheduling() -> None:
    """Set SCHED_BATCH for the calling thread and all that it starts: on waking it does not preempt running threads."""
    _schedule("SCHED_BATCH")


def set_normal_scheduling() -> None:
    """Set normal scheduling for the calling thread: an engine's, whose parent process has batch scheduling."""
    _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    if hasattr(os, policy):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
