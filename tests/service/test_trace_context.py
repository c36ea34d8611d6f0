"""A gateway's id and trace of a request reach its answer and its log line; what is malformed is as if never sent."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from starlette.datastructures import Headers

from service.trace_context import TraceContext, read_request_id, read_trace_context
from tests.service.server import Server, chat_body

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"json": chat_body(max_tokens=1)},
    "/v1/generate": {"data": {"prompt": "a"}},
}


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.lower().encode(), value.encode("latin-1")) for name, value in pairs])


@pytest.mark.parametrize("path", ROUTES)
def test_a_clients_id_is_in_the_answers_header_and_in_the_log(server: Server, path: str) -> None:
    own = f"gw/{uuid.uuid4()}"
    traced = {"X-Request-Id": own, "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1"}
    answers = [server.http.post(path, headers=traced, **ROUTES[path]) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == [own, own]
    ids = {answer.json()["id"] for answer in answers}
    assert len(ids) == 2, "the answer's own id stays unique: the engine knows requests by it"
    server.wait(lambda: all(f"id={each} " in server.log_text() for each in ids))
    for each in ids:
        (line,) = [line for line in server.log_text().splitlines() if f"id={each} " in line]
        assert f"request_id={own} " in line
        assert f"trace_id={TRACE} " in line


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "{}", "-a", "a;b", "caf\u00e9", "a\tb"])
def test_an_id_that_is_none_is_replaced(server: Server, sent: str) -> None:
    """It would go into logs and headers as it is."""
    answer = server.http.post(
        "/v1/chat/completions", json=chat_body(max_tokens=1), headers={b"X-Request-Id": sent.encode()}
    )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == answer.json()["id"]


def test_refusals_carry_the_clients_id_too(server: Server) -> None:
    own = {"X-Request-Id": "from-a-gateway"}
    refusals = [
        server.http.post("/v1/chat/completions", headers=own, json={}),
        server.http.post("/v1/chat/completions", headers=own, content=b"x" * 100),
        server.http.get("/v1/models/none", headers=own),
        server.http.get("/v1/nothing", headers=own),
        server.http.get("/v1/chat/completions", headers=own),
    ]
    assert [refusal.status_code for refusal in refusals] == [400, 400, 404, 404, 405]
    assert {refusal.headers.get("x-request-id") for refusal in refusals} == {"from-a-gateway"}


def test_two_ids_are_none() -> None:
    assert read_request_id(headers(("X-Request-Id", "a"))) == "a"
    assert read_request_id(headers(("X-Request-Id", "a"), ("X-Request-Id", "b"))) is None
    assert read_request_id(headers()) is None


def test_a_traceparent_is_read_as_the_standard_says() -> None:
    found = read_trace_context(
        headers(("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "a=1"), ("tracestate", " b=2"))
    )
    assert found == TraceContext(TRACE, PARENT, 1, "a=1,b=2")
    assert found.sampled
    assert found.traceparent == f"00-{TRACE}-{PARENT}-01"
    silent = read_trace_context(headers(("traceparent", f" 00-{TRACE}-{PARENT}-00 ")))
    assert silent is not None
    assert not silent.sampled
    later = read_trace_context(headers(("traceparent", f"cc-{TRACE}-{PARENT}-01-what-comes-later")))
    assert later is not None
    assert later.traceparent == f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    "sent",
    [
        *("", "00", TRACE, f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-1", f"00-{TRACE}-{PARENT}-01-more"),
        *(f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"),
        *(f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE[:-1]}g-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01.more"),
        f"00_{TRACE}_{PARENT}_01",
    ],
)
def test_a_malformed_traceparent_is_none(sent: str) -> None:
    assert read_trace_context(headers(("traceparent", sent), ("tracestate", "a=1"))) is None


def test_a_tracestate_that_is_too_long_or_unprintable_is_dropped() -> None:
    for state in ("a=" + "1" * 511, "a=\x01", "a=\xe9"):
        found = read_trace_context(headers(("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", state)))
        assert found == TraceContext(TRACE, PARENT, 1, "")
    parent = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    assert read_trace_context(headers(parent, parent)) is None, "two parents are none"
