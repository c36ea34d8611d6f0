"""Turn Ctrl-C and SIGTERM into a flag that a long loop polls: `if stop():` save and leave."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_signals() -> Iterator[Callable[[], bool]]:
    """Handle SIGINT and SIGTERM, and yield a function that returns whether one of them has arrived.

    The second signal raises KeyboardInterrupt at once. The former handlers are restored on exit.
    """
    came: list[int] = []

    def listen(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, listen) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
