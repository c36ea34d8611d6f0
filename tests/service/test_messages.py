"""Anthropic's Messages API by the official client, unchanged, and event by event on the wire."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from model.request import RequestOutput
from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart
from service.routes.messages import Content
from tests.service.conftest import StartServer
from tests.service.server import Server
from tests.service.streams import read_events
from tests.service.test_openai import image_part

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def image(colour: str = "red", **fields: Any) -> dict[str, Any]:
    data = image_part(colour)["image_url"]["url"].partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}, **fields}


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def create(client: anthropic.Anthropic, content: Any = "hello", **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client.messages.create(**{"model": "demo", "messages": messages, "max_tokens": 12} | fields)


def post(server: Server, content: Any = "hello", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    return server.http.post("/v1/messages", json=body | fields)


def text_of(response: httpx.Response) -> str:
    return "".join(block["text"] for block in response.json()["content"])


def test_a_message_has_anthropics_shape(client: anthropic.Anthropic, server: Server) -> None:
    answer = create(client, metadata={"user_id": "me"}, extra_body={"temperature": 0})
    assert answer.id.startswith("msg_")
    assert answer._request_id == answer.id
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    (block,) = answer.content
    assert (block.type, len(block.text.split())) == ("text", 12)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 12)
    details = answer.usage.output_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (8, 13)
    Message.model_validate(post(server).json(), strict=True)


def check_events(events: list[dict[str, Any]]) -> Any:
    """Check the fields and the order of all events; return the message that the client makes of them."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    open_: int | None = None
    blocks = 0
    for event in events:
        if event["type"] == "ping":
            continue
        parsed = EVENT.validate_python(event, strict=True)
        kind = event["type"]
        if kind == "content_block_start":
            assert (open_, event["index"]) == (None, blocks)
            open_, blocks = blocks, blocks + 1
            assert event["content_block"].get("text", "") == event["content_block"].get("thinking", "") == ""
            assert event["content_block"].get("input", {}) == {}
        elif kind.startswith("content_block"):
            assert event["index"] == open_
            open_ = None if kind == "content_block_stop" else open_
        else:
            assert open_ is None
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    return snapshot


def test_a_stream_has_anthropics_events_in_order(server: Server) -> None:
    whole = post(server)
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = read_events(response.read().decode())
    kinds = [event["type"] for event in events]
    deltas = ["content_block_delta"] * (len(kinds) - 6)
    assert len(deltas) > 1
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[3:] == [*deltas, "content_block_stop", "message_delta", "message_stop"]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert (start["usage"]["input_tokens"], start["usage"]["output_tokens"]) == (1, 0)
    message = check_events(events).to_dict()
    assert message["content"] == whole.json()["content"]
    assert (message["stop_reason"], message["usage"]) == ("max_tokens", whole.json()["usage"])


def test_the_clients_stream_helper_accepts_the_events(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    body = {"temperature": 0}
    whole: Any = create(client, max_tokens=300, extra_body=body)
    with client.messages.stream(model="demo", messages=messages, max_tokens=300, extra_body=body) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final: Any = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, "end_turn")
    assert final.usage == whole.usage


HISTORY: list[Any] = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third"},
]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": HISTORY}, HISTORY),
        ({"messages": HISTORY, "system": "be"}, [{"role": "system", "content": "be"}, *HISTORY]),
        (
            {"messages": HISTORY, "system": [text("be", cache_control={"type": "ephemeral"}), text("short")]},
            [{"role": "system", "content": [text("be"), text("short")]}, *HISTORY],
        ),
        (
            {
                "messages": [
                    *HISTORY[:1],
                    {"role": "assistant", "content": [text("second", citations=None)]},
                    *HISTORY[2:],
                ]
            },
            HISTORY,
        ),
        (
            {
                "messages": [
                    user(text("a"), image("red"), text("b"), image("blue", cache_control={"type": "ephemeral"}))
                ]
            },
            [user(text("a"), image_part("red"), text("b"), image_part("blue"))],
        ),
        (
            {
                "messages": [
                    user(image("red") | {"source": {"type": "url", "url": image_part("red")["image_url"]["url"]}})
                ]
            },
            [user(image_part("red"))],
        ),
        (
            {"messages": [user({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}})]},
            [user(text("T\n\nwords"))],
        ),
    ],
    ids=["history", "system", "system blocks", "sent back", "images", "url", "document"],
)
def test_the_answer_is_that_of_the_same_conversation(
    server: Server, fields: dict[str, Any], messages: list[Any]
) -> None:
    response = server.http.post("/v1/messages", json=fields | {"temperature": 0, "max_tokens": 9})
    chat = server.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 9})
    assert text_of(response) == chat.json()["choices"][0]["message"]["content"]
    assert response.json()["usage"]["input_tokens"] == chat.json()["usage"]["prompt_tokens"]


def test_base64_is_read_in_all_its_forms_and_does_not_count_as_text(server: Server) -> None:
    """A photo has far more bytes than the text of a body may have."""
    source = image("red")["source"]
    padded = base64.b64decode(source["data"])
    forms = [source["data"], base64.encodebytes(padded).decode(), source["data"].rstrip("=")]
    forms.append(base64.b64encode(padded + bytes(600_000)).decode())  # what follows a PNG's end is ignored
    answers = {text_of(post(server, [image() | {"source": source | {"data": data}}])) for data in forms}
    assert len(answers) == 1
    long = post(server, [image() | {"source": source | {"data": "A" * 10}}, text("x" * 2_400_000)])
    assert (long.status_code, long.json()["error"]["code"]) == (413, "too_much_text")


def test_a_stop_sequence_is_named(server: Server) -> None:
    words = text_of(post(server)).split()
    for stops in ([words[3]], ["never", words[2], words[5]]):
        answer = post(server, stop_sequences=stops).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stops[len(stops) // 2])
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0, "stream": True}
        events = read_events(server.http.post("/v1/messages", json=body | {"stop_sequences": stops}).text)
        assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stops[len(stops) // 2]}
    assert post(server, max_tokens=300).json()["stop_reason"] == "end_turn"


def test_max_tokens_is_an_upper_bound(server: Server) -> None:
    """Clients must send it, and many send that of Anthropic's models, which is more than most others' whole context."""
    assert post(server, max_tokens=64_000).json()["stop_reason"] == "end_turn"
    assert server.chat(max_tokens=64_000).status_code == 400, "elsewhere it is what the client wants"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"container": "c"}, "container", "not_built"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers", "not_built"),
        ({"n": 3}, "n", "not_built"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "not_built"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing_field"),
        ({"tools": [{"input_schema": {"type": "object"}}]}, "tools[0].name", "missing_field"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "missing_field"),
        (
            {"messages": [HISTORY[0], user({"type": "document", "source": {"type": "url", "url": "http://x"}})]},
            "messages[1].content[0].source",
            "not_built",
        ),
        (
            {"messages": [user(text("x"), image() | {"source": {"type": "file", "file_id": "f"}})]},
            "messages[0].content[1].source.type",
            "not_built",
        ),
        (
            {"messages": [user(text("x"), image() | {"source": image()["source"] | {"data": "AAAA"}})]},
            "messages[0].content[1]",
            "unsupported_media",
        ),
        (
            {"system": "s", "messages": [HISTORY[0], user(image() | {"source": {"type": "url", "url": "what"}})]},
            "messages[1].content[0]",
            None,
        ),
        ({"messages": [user({"type": "thinking", "thinking": "x"})]}, "messages[0].content[0].type", "not_built"),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_field"),
        ({"messages": [{"role": "user", "content": "x " * 600_000}]}, "messages", "prompt_too_long"),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences", None),
        ({"stop_sequences": [""]}, "stop_sequences", None),
        ({"top_p": 9}, "top_p", None),
        ({"model": "claude-9"}, "model", "model_not_found"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused_is_named_as_it_was_sent(
    server: Server, fields: dict[str, Any], param: str, code: str | None
) -> None:
    response = post(server, **fields)
    answer = response.json()
    ErrorResponse.model_validate(answer, strict=True)
    kind = {404: "not_found_error"}.get(response.status_code, "invalid_request_error")
    assert response.status_code in (400, 404, 415)
    assert (answer["type"], answer["error"]["type"], answer["error"]["param"]) == ("error", kind, param)
    assert code in (None, answer["error"]["code"])
    assert answer["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
        ("POST", "/v1/messages/", 404, "not_found_error"),
    ],
)
def test_other_methods_and_paths_of_it_answer_in_its_envelope(
    server: Server, method: str, path: str, status: int, kind: str
) -> None:
    response = server.http.request(method, path, json={})
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert "error" in server.http.get("/v1/nowhere").json()


def test_the_clients_errors_are_those_of_anthropic(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        create(client, model="claude-9")
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
        create(client, stop_sequences=["x"] * 99)
    with pytest.raises(anthropic.APIStatusError) as failed:
        create(client, "FAIL AT 0")
    assert (failed.value.status_code, failed.value.type) == (500, "api_error")


def test_what_has_no_effect_is_accepted(server: Server) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    fields: dict[str, Any] = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "system": None,
        "tools": [],
        "tool_choice": {"type": "auto"},
        "mcp_servers": [],
        **cached,
    }
    whole = text_of(post(server))
    assert text_of(post(server, **fields)) == whole
    assert text_of(post(server, [text("hello", **cached)])) == whole
    for name, value in fields.items():
        assert text_of(post(server, **{name: value})) == whole, name
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x-2025-01-01"}
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    assert text_of(server.http.post("/v1/messages?beta=true", json=body, headers=headers)) == whole


@pytest.mark.parametrize("at", [1, 7])
def test_a_failure_in_a_stream_is_an_event(server: Server, client: anthropic.Anthropic, at: int) -> None:
    messages: Any = [{"role": "user", "content": f"FAIL AT {at}"}]
    events = read_events(
        server.http.post("/v1/messages", json={"messages": messages, "max_tokens": 30, "stream": True}).text
    )
    assert events[0]["type"] == "message_start"
    ErrorResponse.model_validate(events[-1], strict=True)
    assert events[-1]["error"]["type"] == "api_error"
    assert "secret" not in json.dumps(events)
    with (
        pytest.raises(anthropic.APIStatusError),
        client.messages.stream(model="demo", messages=messages, max_tokens=30) as stream,
    ):
        stream.get_final_message()
    assert post(server).status_code == 200


def test_a_silent_stream_is_kept_alive_by_pings(start_server: StartServer) -> None:
    server = start_server({"delay": 0.6}, sse_keepalive_seconds=0.2)
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "stream": True}
    events = read_events(server.http.post("/v1/messages", json=body).text)
    assert [event["type"] for event in events].count("ping") > 1
    check_events(events)


def test_a_key_comes_in_either_header(start_server: StartServer) -> None:
    server = start_server(api_key="right,other")
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    cases: tuple[tuple[dict[str, str], int], ...] = (
        ({}, 401),
        ({"x-api-key": "right"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"authorization": "Bearer other"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer wrong", "x-api-key": "right"}, 200),
        ({"authorization": "Basic abc", "x-api-key": "right"}, 200),
        ({"authorization": "Bearer right", "x-api-key": "wrong"}, 200),
        ({"x-api-key": ""}, 401),
    )
    for headers, status in cases:
        response = server.http.post("/v1/messages", json=body, headers=headers)
        assert response.status_code == status, headers
        if status == 401:
            ErrorResponse.model_validate(response.json(), strict=True)
            assert response.json()["error"]["type"] == "authentication_error"
    with anthropic.Anthropic(base_url=server.url, api_key="right", max_retries=0) as by_key:
        assert create(by_key).role == "assistant"
    with anthropic.Anthropic(base_url=server.url, auth_token="other", max_retries=0) as by_token:
        assert create(by_token).role == "assistant"
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as wrong:
        with pytest.raises(anthropic.AuthenticationError):
            create(wrong)


# --- what large models say


ANSWER: list[list[Delta]] = [
    [ReasoningDelta("Let me")],
    [],
    [ReasoningDelta(" see."), TextDelta("I will ")],
    [TextDelta("call."), ToolCallStart(0, "call_a", "look"), ArgumentsDelta(0, '{"at":')],
    [ArgumentsDelta(0, " 1}"), ToolCallStart(1, "call_b", "stop"), TextDelta("Done.")],
]


def rendered(answer: list[list[Delta]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the events of an answer's blocks, and the blocks."""
    content = Content()
    events = [event for deltas in answer for event in content.feed(deltas, RequestOutput("r", "", ()))]
    events += content.finish()
    return read_events(b"".join(events).decode()), content.blocks


def test_each_kind_of_block_has_its_events() -> None:
    events, blocks = rendered(ANSWER)
    start, stop = "content_block_start", "content_block_stop"
    kinds = [(event["index"], event.get("delta", {}).get("type", event["type"])) for event in events]
    assert kinds == [
        *((0, kind) for kind in (start, "thinking_delta", "thinking_delta", "signature_delta", stop)),
        *((1, kind) for kind in (start, "text_delta", "text_delta", stop)),
        *((2, kind) for kind in (start, "input_json_delta", "input_json_delta", stop)),
        *((3, kind) for kind in (start, stop)),
        *((4, kind) for kind in (start, "text_delta", stop)),
    ]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("Let me see.", "I will call.")
    assert blocks[0]["signature"]
    assert (blocks[2]["id"], blocks[2]["name"], blocks[2]["input"]) == ("call_a", "look", {"at": 1})
    assert blocks[3]["input"] == {}
    usage = {"input_tokens": 1, "output_tokens": 1}
    opening: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "usage": usage,
    }
    opening |= {"stop_reason": None, "stop_sequence": None}
    message = check_events([{"type": "message_start", "message": opening}, *events])
    assert [block.to_dict() for block in message.content] == blocks


@pytest.mark.parametrize("arguments", ['{"at": ', "[1]", "nonsense", "1"])
def test_arguments_that_are_no_object_are_not_lost(arguments: str) -> None:
    """An answer may be cut inside a call."""
    _, (block,) = rendered([[ToolCallStart(0, "c", "look"), ArgumentsDelta(0, arguments)]])
    assert block["input"] == {"INVALID_JSON": arguments}


def test_an_answer_without_anything_is_an_empty_text() -> None:
    events, blocks = rendered([[]])
    assert blocks == [{"type": "text", "text": "", "citations": None}]
    assert [event["type"] for event in events] == ["content_block_start", "content_block_stop"]


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic, server: Server) -> None:
    messages: Any = [user(text("how many are"), image("red"), text("these words?"))]
    fields: Any = {"model": "demo", "messages": messages, "system": "Count."}
    counted = client.messages.count_tokens(**fields)
    usage = client.messages.create(**fields, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 5
    assert (
        client.messages.count_tokens(model="demo", messages=[*messages, *HISTORY]).input_tokens > counted.input_tokens
    )
    broken = {"messages": [user(text("x"), image() | {"source": image()["source"] | {"data": "AAAA"}})]}
    refused = server.http.post("/v1/messages/count_tokens", json=broken)
    assert (refused.status_code, refused.json()["error"]["param"]) == (415, "messages[0].content[1]")
    ErrorResponse.model_validate(refused.json(), strict=True)


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}, {}])
def test_a_thread_is_refused_by_the_code_that_the_client_knows(server: Server, thread: dict[str, Any]) -> None:
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hello"}], "thread": thread}
    refused = server.http.post("/v1/messages", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "thread")
    assert refused.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
