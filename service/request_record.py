"""What is known of a request and its answers, for metrics, traces and the log. Times are monotonic, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.request import FinishReason, RequestOutput, RequestStats, TokenLogprobs
from service.pool.generation import Generation
from service.trace_context import TraceContext

NO_STATS = RequestStats(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


@dataclass
class Choice:
    """One answer of a request, as far as it was generated."""

    generation: Generation
    finish_reason: FinishReason | None = None
    stats: RequestStats = NO_STATS
    num_tokens: int = 0
    num_first_tokens: int = 0  # tokens of the first output
    first_at: float | None = None
    last_at: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, where requested

    @property
    def text(self) -> str:
        return self.generation.text

    @property
    def decode_seconds(self) -> float:
        return 0.0 if self.first_at is None else self.last_at - self.first_at

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per token after the first output; None without any. The first output's tokens arrive together."""
        later = self.num_tokens - self.num_first_tokens
        return self.decode_seconds / later if later > 0 else None

    def add(self, output: RequestOutput, now: float) -> None:
        """Count an output that arrived at `now`."""
        if output.tokens:
            self.last_at = now
            if self.first_at is None:
                self.first_at, self.num_first_tokens = now, len(output.tokens)
            self.num_tokens += len(output.tokens)
            self.logprobs += output.logprobs or ()
        self.stats = output.stats or self.stats
        self.finish_reason = output.finish_reason or self.finish_reason


@dataclass(frozen=True)
class RequestRecord:
    """A request that has ended.

    outcome: timeout, error, refused or abort; that of the request where it has no choices, else of those without a
    finish reason. error: the code of what ended it early; None where every choice is finished. load_at and loaded_at:
    when its body was complete, and when its media were; submitted_at: when the engine got it. None: not reached.
    """

    id: str
    client_id: str | None  # the client's own, where it sent one
    route: str
    trace: TraceContext | None
    arrived: float
    load_at: float | None
    loaded_at: float | None
    submitted_at: float | None
    ended: float
    outcome: str
    error: str | None
    choices: Sequence[Choice]  # those of a prompt side by side
    num_prompts: int
    num_media: int
    media_seconds: float

    @property
    def latency(self) -> float:
        return self.ended - self.arrived

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token of the first choice; None without one."""
        first_at = self.choices[0].first_at if self.choices else None
        return None if first_at is None else first_at - self.arrived
