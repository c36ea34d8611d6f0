"""What the load generator is told, and what it hands back: the messages between it and the command that started it."""

from __future__ import annotations

import msgspec


class Prepared(msgspec.Struct, frozen=True):
    """A request as it will be sent; made before the load begins, so that making it takes nothing from it."""

    kind: str
    body: bytes


class Plan(msgspec.Struct, frozen=True):
    url: str
    path: str
    headers: dict[str, str]
    requests: list[Prepared]  # taken in turn, again from the start after the last
    stages: list[tuple[float, int]]  # seconds, and the number of users during them
    warm_up: float  # seconds of the first stage before the window that counts
    timeout: float  # seconds for one request
    max_requests: int
    stop: str | None = None  # a file; once it is there, the load is over


class Record(msgspec.Struct):
    """One request; moments in seconds from the start of the load."""

    kind: str
    start: float
    end: float
    users: int  # that there were when it began
    failure: str | None = None
    detail: str = ""  # of a failure, for people
    first: float | None = None  # the first text
    tokens: int = 0  # as `usage` says
    prompt_tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    num_events: int = 0
    longest_gap: float = 0.0

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.start

    @property
    def seconds_per_token(self) -> float | None:
        """(end - first) / (tokens - 1): an event may carry several tokens."""
        return None if self.first is None or self.tokens < 2 else (self.end - self.first) / (self.tokens - 1)


class Outcome(msgspec.Struct):
    """Everything that was sent, and how the generator itself fared."""

    records: list[Record]
    window: tuple[float, float]
    cpu_share: float  # of one core, by the generator's process
    machine_busy: float  # of all cores, by everything
    lag: list[float]  # seconds by which a timer of the generator's loop was late, sorted
    truncated: bool  # max_requests was reached
