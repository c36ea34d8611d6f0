"""Who waits for whom where the engine and the service share the processor's cores.

The engine's threads work through a pass in small tasks, and each waits for the other's last one. A process that wakes
up and takes a core in the middle of a task stops them all. So everything around an engine on a CPU gives way: it does
not push a running thread aside when it wakes, and the engine offers its cores between tasks (EngineConfig.share_cores).
Shares of the processor stay as they were. Linux only; elsewhere nothing changes.
"""

from __future__ import annotations

import os


def give_way() -> None:
    """The calling thread, and what it starts from now on, no longer pushes a running thread aside when it wakes."""
    _schedule("SCHED_BATCH")


def take_part() -> None:
    """The calling thread is scheduled as any other again: the engine's, whose parent gives way."""
    _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    if hasattr(os, policy):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
