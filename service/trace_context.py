"""Read what gateways and clients say of a request: its id (`X-Request-Id`) and its place in a trace (`traceparent`).

Both are only labels: what is malformed is ignored, never refused. https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

REQUEST_ID = "X-Request-Id"
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@~-]{0,127}\Z")
TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
MAX_TRACESTATE = 512  # characters
SAMPLED = 1


@dataclass(frozen=True)
class TraceContext:
    """The span that a request is part of. state: what tracing systems want passed on, as it came."""

    trace_id: str  # 32 hexadecimal digits
    parent_id: str  # 16 hexadecimal digits, of the caller's span
    flags: int = 0
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Return whether the caller records this trace."""
        return bool(self.flags & SAMPLED)

    @property
    def traceparent(self) -> str:
        """The header's value, in the version that we know."""
        return f"00-{self.trace_id}-{self.parent_id}-{self.flags:02x}"


def read_trace_context(headers: Headers) -> TraceContext | None:
    """Read `traceparent` and `tracestate`; return None where there is none, or no valid one."""
    sent = headers.getlist("traceparent")
    found = TRACEPARENT.match(sent[0].strip()) if len(sent) == 1 else None
    if found is None or found["version"] == "ff" or not int(found["trace"], 16) or not int(found["parent"], 16):
        return None
    rest = sent[0].strip()[found.end() :]
    if rest and (found["version"] == "00" or not rest.startswith("-")):  # later versions may have more fields
        return None
    state = ",".join(part for each in headers.getlist("tracestate") if (part := each.strip()))
    if len(state) > MAX_TRACESTATE or not (state.isascii() and state.isprintable()):
        state = ""
    return TraceContext(found["trace"], found["parent"], int(found["flags"], 16), state)


def read_request_id(headers: Headers) -> str | None:
    """Return the client's `X-Request-Id`; None without one that is short and has no unusual characters."""
    sent = headers.getlist(REQUEST_ID)
    return sent[0] if len(sent) == 1 and SAFE_ID.match(sent[0]) else None
