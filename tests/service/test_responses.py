"""OpenAI's Responses API by the official client, unchanged, and event by event on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from model.request import RequestOutput, Token, TokenLogprob, TokenLogprobs
from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart
from service.routes.responses import Output
from tests.service.server import Server, chat_body
from tests.service.streams import read_events
from tests.service.test_openai import image_part

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def image(colour: str = "red", **fields: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": image_part(colour)["image_url"]["url"], "detail": "auto", **fields}


def text(value: str) -> dict[str, Any]:
    return {"type": "input_text", "text": value}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def create(client: openai.OpenAI, content: Any = "hello", **fields: Any) -> Any:
    fields = {"max_output_tokens": 12, "temperature": 0} | fields
    return client.responses.create(model="demo", input=content, **fields)


def post(server: Server, content: Any = "hello", **fields: Any) -> httpx.Response:
    return server.http.post("/v1/responses", json={"input": content, "temperature": 0} | fields)


def test_a_response_has_openais_shape(client: openai.OpenAI, server: Server) -> None:
    answer = create(client, metadata={"a": "b"}, instructions="Be short.", store=True, user="me")
    assert answer.id.startswith("resp_")
    assert answer._request_id == answer.id
    assert (answer.object, answer.model, answer.status) == ("response", "demo", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be short.", {"a": "b"}, 12)
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert len(answer.output_text.split()) == 12
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 12, 15)
    details = answer.usage.output_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (8, 13)
    whole = post(server, max_output_tokens=200).json()
    assert (whole["status"], whole["incomplete_details"], whole["store"]) == ("completed", None, False)
    assert whole["completed_at"] >= whole["created_at"]
    Response.model_validate(whole, strict=True)


def test_a_stream_has_openais_events_in_order(client: openai.OpenAI, server: Server) -> None:
    whole = create(client)
    body = {"input": "hello", "temperature": 0, "max_output_tokens": 12, "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = read_events(response.read().decode())
    opening = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    closing = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    kinds = [event["type"] for event in events]
    deltas = ["response.output_text.delta"] * (len(kinds) - 8)
    assert len(deltas) > 1
    assert kinds == [*opening, *deltas, *closing, "response.incomplete"]
    check_events(events)
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == whole.output_text
    assert final["usage"] == whole.usage.to_dict()
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["id"] == final["id"]


def check_events(events: list[dict[str, Any]]) -> None:
    """Check the fields of all events, their numbers, and that deltas add up to what is reported as done."""
    sums: dict[int, str] = {}
    for number, event in enumerate(events):
        EVENT.validate_python(event, strict=True)
        assert event["sequence_number"] == number
        kind, index = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            assert index == len(sums)
            assert event["item"]["status"] == "in_progress"
            assert event["item"].get("arguments", "") == ""
            assert event["item"].get("content", []) == []
            sums[index] = ""
        elif kind == "response.content_part.added":
            assert event["part"]["text"] == ""
        elif kind.endswith(".delta"):
            sums[index] += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            assert sums[index] == event.get("text", event.get("arguments"))
    if (last := events[-1]["response"])["status"] != "failed":
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == last["output"]


def test_the_clients_stream_helper_accepts_the_events(client: openai.OpenAI) -> None:
    whole = create(client, max_output_tokens=200)
    with client.responses.stream(model="demo", input="hello", temperature=0, max_output_tokens=200) as stream:
        words = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert words == final.output_text == whole.output_text
    assert final.status == "completed"


HISTORY = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third"},
]
SENT_BACK = [
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "second", "annotations": [], "logprobs": []}],
    },
]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"input": "one two"}, [{"role": "user", "content": "one two"}]),
        ({"input": "x", "instructions": "y"}, [{"role": "system", "content": "y"}, {"role": "user", "content": "x"}]),
        ({"input": HISTORY}, HISTORY),
        ({"input": [HISTORY[0], *SENT_BACK[1:], HISTORY[2]]}, HISTORY),
        (
            {"input": [HISTORY[0], SENT_BACK[0]]},
            [HISTORY[0], {"role": "assistant", "content": None, "reasoning_content": ""}],
        ),
        (
            {"input": [{"type": "message", "role": "developer", "content": "y"}, user(text("x"))]},
            [{"role": "system", "content": "y"}, {"role": "user", "content": "x"}],
        ),
        (
            {"input": [user(text("a"), image("red"), text("b"), image("blue"))]},
            [
                user(
                    {"type": "text", "text": "a"},
                    image_part("red"),
                    {"type": "text", "text": "b"},
                    image_part("blue"),
                )
            ],
        ),
    ],
    ids=["text", "instructions", "history", "sent back", "reasoning last", "developer", "images"],
)
def test_the_answer_is_that_of_the_same_conversation(
    server: Server, fields: dict[str, Any], messages: list[Any]
) -> None:
    response = server.http.post("/v1/responses", json=fields | {"temperature": 0, "max_output_tokens": 9})
    chat = server.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 9})
    words = response.json()["output"][0]["content"][0]["text"]
    assert words == chat.json()["choices"][0]["message"]["content"]
    assert response.json()["usage"]["input_tokens"] == chat.json()["usage"]["prompt_tokens"]


def test_images_count_and_so_does_their_order(client: openai.OpenAI) -> None:
    question = text("what is it?")
    contents = [
        [question],
        [image("red"), question],
        [image("blue"), question],
        [image("red"), image("blue"), question],
    ]
    contents += [[image("blue"), image("red"), question]]
    assert len({create(client, [user(*content)]).output_text for content in contents}) == 5
    assert create(client, [user(*contents[1])]).output_text == create(client, [user(*contents[1])]).output_text
    assert create(client, [user(image("red", detail=None), question)]).output_text
    assert create(client, [user(image("red", detail="original"), question)]).output_text


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not_built"),
        ({"conversation": "conv_1"}, "conversation", "not_built"),
        ({"background": True}, "background", "not_built"),
        ({"prompt": {"id": "p"}}, "prompt", "not_built"),
        ({"n": 2}, "n", "not_built"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not_built"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_field"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "not_built"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "missing_field"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_field"),
        ({"input": [user({**image(), "file_id": "file-1"})]}, "input[0].content[0].file_id", "not_built"),
        ({"input": [user({"type": "input_image"})]}, "input[0].content[0].image_url", "missing_field"),
        ({"input": [user({"type": "input_file", "file_id": "file-1"})]}, "input[0].content[0].type", "not_built"),
        ({"input": [user({"type": "input_audio"})]}, "input[0].content[0].type", "not_built"),
        ({"input": [HISTORY[0], {"type": "item_reference", "id": "msg_1"}]}, "input[1]", "not_built"),
        ({"input": [HISTORY[0], {"type": "web_search_call", "id": "w"}]}, "input[1].type", "not_built"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing_field"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_field"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id", "missing_field"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "missing_field"),
        ({"input": []}, "input", "invalid_request"),
        (
            {"input": [user(text("x"), image() | {"image_url": "data:image/png;base64,AAAA"})]},
            "input[0].content[1]",
            None,
        ),
        (
            {"instructions": "x", "input": [HISTORY[0], user(image() | {"image_url": "what"})]},
            "input[1].content[0]",
            None,
        ),
        ({"input": "x " * 600_000}, "input", "prompt_too_long"),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_output_tokens": 10**6}, "max_output_tokens", None),
        ({"temperature": 9}, "temperature", None),
        ({"top_logprobs": 99}, "top_logprobs", None),
        ({"model": "another"}, "model", "model_not_found"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused_is_named_as_it_was_sent(
    server: Server, fields: dict[str, Any], param: str, code: str | None
) -> None:
    response = post(server, **fields)
    error = response.json()["error"]
    assert response.status_code in (400, 404, 415), error
    assert error["param"] == param
    assert code in (None, error["code"])
    assert "messages[" not in error["message"]
    assert "max_completion_tokens" not in error["message"]
    assert " max_tokens" not in error["message"]


def test_what_asks_for_nothing_is_accepted(server: Server) -> None:
    fields: dict[str, Any] = {
        "background": False,
        "conversation": None,
        "previous_response_id": None,
        "store": True,
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"summary": "auto"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "stream_options": None,
        "tools": [],
        "tool_choice": "auto",
        "max_tool_calls": 3,
        "context_management": [],
    }
    whole = post(server, **fields)
    assert whole.status_code == 200, whole.text
    for name, value in fields.items():
        assert post(server, **{name: value}).json()["output"][0]["content"] == whole.json()["output"][0]["content"], (
            name
        )


@pytest.mark.parametrize("at", [1, 7])
def test_a_failure_in_a_stream_is_an_event(server: Server, client: openai.OpenAI, at: int) -> None:
    body = {"input": f"FAIL AT {at}", "stream": True, "max_output_tokens": 30}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200
        events = read_events(response.read().decode())
    check_events(events)
    error, failed = events[-2:]
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert error["code"] == "engine_failure"
    assert "secret" not in json.dumps(events)
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    assert failed["response"]["output"][0]["status"] == "incomplete"
    with client.responses.stream(model="demo", input=f"FAIL AT {at}") as stream:
        assert [event.type for event in stream][-1] == "response.failed"
    assert post(server).status_code == 200


def test_a_chat_completions_body_is_told_what_is_missing(server: Server) -> None:
    error = server.http.post("/v1/responses", json=chat_body()).json()["error"]
    assert (error["param"], error["code"]) == ("input", "missing_field")


# --- what large models say


def output(finish_reason: Any = None, logprobs: Any = None) -> RequestOutput:
    return RequestOutput("r", "", (), finish_reason, logprobs=logprobs)


ANSWER: list[list[Delta]] = [
    [ReasoningDelta("Let me")],
    [],
    [ReasoningDelta(" see."), TextDelta("I will ")],
    [TextDelta("call."), ToolCallStart(0, "call_a", "look"), ArgumentsDelta(0, '{"at":')],
    [ArgumentsDelta(0, " 1}"), ToolCallStart(1, "call_b", "stop"), TextDelta("Done.")],
]


def rendered(answer: list[list[Delta]], finish: str = "stop") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the events of an answer and its items."""
    out = Output("resp_1")
    events = [event for deltas in answer for event in out.feed(deltas, output())]
    events += out.feed([], output(finish)) + out.finish()
    return read_events(b"".join(events).decode()), out.items


def test_each_kind_of_item_has_its_events() -> None:
    events, items = rendered(ANSWER)
    added, done = "response.output_item.added", "response.output_item.done"
    part_added, part_done = "response.content_part.added", "response.content_part.done"
    thought, words, arguments = "response.reasoning_text", "response.output_text", "response.function_call_arguments"
    assert [(event.get("output_index"), event["type"]) for event in events] == [
        *((0, kind) for kind in (added, part_added, f"{thought}.delta", f"{thought}.delta")),
        *((0, kind) for kind in (f"{thought}.done", part_done, done)),
        *(
            (1, kind)
            for kind in (added, part_added, f"{words}.delta", f"{words}.delta", f"{words}.done", part_done, done)
        ),
        *((2, kind) for kind in (added, f"{arguments}.delta", f"{arguments}.delta", f"{arguments}.done", done)),
        *((3, kind) for kind in (added, f"{arguments}.done", done)),
        *((4, kind) for kind in (added, part_added, f"{words}.delta", f"{words}.done", part_done, done)),
    ]
    check_events([*events, final(events, items)])
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["status"] for item in items] == ["completed"] * 5
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert (items[2]["call_id"], items[2]["name"], items[2]["arguments"]) == ("call_a", "look", '{"at": 1}')
    assert items[3]["arguments"] == ""
    assert len({item["id"] for item in items}) == 5


def final(events: list[dict[str, Any]], items: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    """Return the event that ends a stream."""
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1.0,
        "model": "m",
        "output": items,
        "status": status,
    }
    response |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {"type": f"response.{status}", "sequence_number": len(events), "response": response}


def test_an_answer_that_was_cut_says_so_in_its_last_item_alone() -> None:
    _, items = rendered(ANSWER, "length")
    assert [item["status"] for item in items] == [*["completed"] * 4, "incomplete"]


def test_an_answer_without_anything_is_an_empty_text() -> None:
    events, items = rendered([[]])
    assert [item["content"][0]["text"] for item in items] == [""]
    check_events([*events, final(events, items)])


def test_log_probabilities_go_with_their_text() -> None:
    """A token may come before its text is complete; the sum of the deltas is what the item reports."""

    def token(piece: str) -> TokenLogprobs:
        return TokenLogprobs(TokenLogprob(1, piece.encode(), -0.5), (TokenLogprob(1, piece.encode(), -0.5),))

    out = Output("resp_1")
    events = out.feed([TextDelta("a")], output(logprobs=(token("a"),)))
    events += out.feed([], output(logprobs=(token("b"),)))
    events += out.feed([TextDelta("bc")], output(logprobs=(token("c"),)))
    events += out.feed([], output("stop", logprobs=(token("d"),)))
    events += out.finish()
    deltas = [event for event in read_events(b"".join(events).decode()) if event["type"].endswith("text.delta")]
    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["a"], ["b", "c"]]
    (item,) = out.items
    assert [entry["token"] for entry in item["content"][0]["logprobs"]] == ["a", "b", "c", "d"]
    assert item["content"][0]["logprobs"][0]["top_logprobs"][0]["logprob"] == -0.5


@pytest.mark.parametrize(
    "pieces",
    [
        ["think", "</think>", "text"],
        ["text", "<call>", "{}", "</call>"],
        ["text", "<call>", "{}", "more", " text"],
        ["think", "thought", "</think>", "text", "more", " text"],
        ["think", "</think>", "text", "<call>", "{}", "more"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("together", [1, 2, 3])
def test_every_text_has_its_log_probabilities_however_tokens_arrive(pieces: list[str], together: int) -> None:
    """A step that ended the reasoning and began the text once dropped those of the text with those of the reasoning."""
    deltas: dict[str, list[Delta]] = {
        "think": [ReasoningDelta("think")],
        "thought": [ReasoningDelta("thought")],
        "<call>": [ToolCallStart(0, "call_a", "f")],
        "{}": [ArgumentsDelta(0, "{}")],
        **{piece: [TextDelta(piece)] for piece in ("text", "more", " text")},
    }
    out = Output("resp_1")
    events = []
    for start in range(0, len(pieces), together):
        part = pieces[start : start + together]
        entries = tuple(TokenLogprobs(TokenLogprob(1, piece.encode(), -0.5), ()) for piece in part)
        tokens = tuple(Token(1, piece, "target") for piece in part)
        step = RequestOutput("r", "".join(part), tokens, logprobs=entries)
        events += out.feed([delta for piece in part for delta in deltas.get(piece, [])], step)
    events += out.finish()
    every = read_events(b"".join(events).decode())
    streamed = [event for event in every if event["type"] == "response.output_text.delta"]
    assert streamed
    for event in streamed:
        assert event["delta"] in "".join(entry["token"] for entry in event["logprobs"])
        assert not {"think", "thought"} & {entry["token"] for entry in event["logprobs"]}
    for item in out.items:
        if item["type"] == "message":
            (content,) = item["content"]
            assert content["text"] in "".join(entry["token"] for entry in content["logprobs"])


def test_tokens_are_counted_without_a_response(client: openai.OpenAI, server: Server) -> None:
    content: Any = [user(text("how many are"), image("red"), text("these words?"))]
    counted = client.responses.input_tokens.count(model="demo", input=content, instructions="Count.")
    answer = client.responses.create(model="demo", input=content, instructions="Count.", max_output_tokens=1)
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens > 5
    assert counted.object == "response.input_tokens"
    broken = {"input": [user(text("x"), image() | {"image_url": "what"})]}
    refused = server.http.post("/v1/responses/input_tokens", json=broken)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[0].content[1]")
