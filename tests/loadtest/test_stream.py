"""What one streamed answer's lines come to: moments, tokens, and whether it ended as it should."""

from __future__ import annotations

import json

import pytest

from loadtest.plan import Record
from loadtest.stream import Malformed, Stream


def said(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode()


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 13, "total_tokens": 22}}'
DONE = b"data: [DONE]"
ROLE = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}'


def read(*lines: tuple[float, bytes]) -> tuple[Stream, Record]:
    stream, record = Stream(), Record("image", 1.0, 0.0, 1)
    for now, line in lines:
        stream.line(line + b"\n", now)
        stream.line(b"\n", now)
    record.failure, record.end = stream.failure, stream.last or 0.0
    stream.fill(record)
    return stream, record


def test_tokens_are_those_of_usage_and_not_events() -> None:
    """Counting events would call this 1.5 s a token: a verify step's several tokens come in one event."""
    _, record = read(
        (1.5, ROLE), (2.0, said("a")), (3.5, said("b c d e")), (5.0, said("f g")), (5.0, USAGE), (5.0, DONE)
    )
    assert record.failure is None
    assert record.ttft == pytest.approx(1.0), "an event without text is no token"
    assert record.seconds_per_token == pytest.approx(3.0 / 12)
    assert record.num_events == 3
    assert record.longest_gap == pytest.approx(1.5)


def test_a_single_token_has_no_time_per_token() -> None:
    usage = USAGE.replace(b"13", b"1")
    assert read((2.0, said("a")), (2.0, usage), (2.0, DONE))[1].seconds_per_token is None


@pytest.mark.parametrize(
    ("lines", "failure"),
    [
        ((said("a"), USAGE, DONE), None),
        ((b": a comment keeps the connection open", said("a"), USAGE, DONE), None),
        ((said("a"), USAGE), "dropped"),
        ((), "dropped"),
        ((said("a"), DONE), "no usage"),
        ((said("a"), b'data: {"error": {"message": "the engine failed"}}', DONE), "error event"),
    ],
)
def test_a_stream_that_does_not_end_well_says_how(lines: tuple[bytes, ...], failure: str | None) -> None:
    stream, record = read(*((2.0, line) for line in lines))
    assert stream.failure == failure
    if failure == "error event":
        assert "the engine failed" in record.detail


@pytest.mark.parametrize("line", [b"HTTP/1.1 500", b"data: {", b'data: {"choices": 3}'])
def test_what_is_no_event_is_malformed(line: bytes) -> None:
    with pytest.raises(Malformed):
        Stream().line(line, 1.0)


def test_nothing_may_follow_the_end() -> None:
    stream = Stream()
    stream.line(DONE, 1.0)
    with pytest.raises(Malformed):
        stream.line(said("more"), 2.0)
