"""Fields that nobody here knows are ignored, and named in a header and in the log; `--strict` refuses them."""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service import unknown_fields
from service.schemas.openai import ChatRequest
from service.unknown_fields import HEADER, MAX_HEADER, MAX_WARNED, WARN_AGAIN, Warnings, decode
from tests.media.samples import encoded, picture
from tests.service.refusals import USER, refusal
from tests.service.server import Server

URL = "data:image/png;base64," + base64.b64encode(encoded(picture(40, 30), "PNG")).decode()
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "x"}


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, {"strict": "true"})
        yield server
        assert server.close() == 0, server.log_text()


def user(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts), **more}], "temperature": 0, "max_tokens": 2}


CASES: list[tuple[dict[str, Any], str]] = [
    (user(TEXT) | {"colour": "red"}, "colour"),
    (user(TEXT) | {"priority": 3, "request_id": "r", "vllm_xargs": {"a": 1}}, "priority, request_id, vllm_xargs"),
    (user(TEXT) | {"colour": None}, "colour"),
    (user(TEXT, mood="good"), "messages[0].mood"),
    (user(TEXT, IMAGE | {"size": 3}), "messages[0].content[1].size"),
    (user(IMAGE | {"fps": 1.0}), "messages[0].content[0].fps"),
    (user({"type": "image_url", "image_url": {"url": URL, "note": "x"}}), "messages[0].content[0].image_url.note"),
    (user(TEXT) | {"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "stream_options.x"),
    (user(TEXT) | {"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (user(TEXT | {"a": 1, "b": 2}) | {"z": 1}, "messages[0].content[0].a, messages[0].content[0].b, z"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "odd": 1}]}, USER]},
        "messages[1].tool_calls[0].odd",
    ),
    (user(TEXT) | {"evil\r\nSet-Cookie: a=b": 1, "ä ö": 2}, "evil??Set-Cookie??a?b, ???"),
]


@pytest.mark.parametrize(("body", "named"), CASES, ids=[named for _, named in CASES])
def test_unknown_fields_are_ignored_and_named(server: Server, strict: Server, body: dict[str, Any], named: str) -> None:
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == named
    error = refusal(strict.http.post("/v1/chat/completions", json=body), 400)
    assert error["code"] == "unknown_field"
    assert f"{error['param']} is not a known field" == error["message"]


def test_the_answer_is_that_of_a_request_without_them(server: Server) -> None:
    plain = server.http.post("/v1/chat/completions", json=user(IMAGE, TEXT)).json()
    more = server.http.post("/v1/chat/completions", json=user(IMAGE | {"x": 1}, TEXT | {"y": 2}) | {"z": 3})
    assert more.json()["choices"] == plain["choices"]
    assert more.json()["usage"] == plain["usage"]
    assert HEADER not in server.http.post("/v1/chat/completions", json=user(IMAGE, TEXT)).headers


def test_they_are_named_in_a_refusal_too(server: Server) -> None:
    """Which may be due to a field that was misspelt."""
    response = server.http.post("/v1/chat/completions", json=user(TEXT) | {"max_token": 5, "temperature": -1})
    assert refusal(response, 400)["param"] == "temperature"
    assert response.headers[HEADER] == "max_token"


def test_a_form_may_have_them_as_text_but_no_unknown_files(server: Server, strict: Server) -> None:
    data = {"prompt": "x", "max_tokens": "2", "colour": "red", "response_format": '{"type": "text", "odd": 1}'}
    response = server.http.post("/v1/generate", data=data)
    assert (response.status_code, response.headers[HEADER]) == (200, "colour, response_format.odd")
    assert refusal(strict.http.post("/v1/generate", data=data), 400)["code"] == "unknown_field"
    assert (
        refusal(server.http.post("/v1/generate", data={"prompt": "x"}, files={"sound": b"x"}), 400)["param"] == "sound"
    )


ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": user(TEXT),
    "completions": {"prompt": "x", "max_tokens": 2},
    "responses": {"input": [{"role": "user", "content": "x"}], "max_output_tokens": 16},
    "messages": {"messages": [USER], "max_tokens": 2},
    "messages/count_tokens": {"messages": [USER]},
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_takes_them_alike(server: Server, strict: Server, route: str) -> None:
    path, body = f"/v1/{route}", ROUTES[route]
    plain = server.http.post(path, json=body)
    assert plain.status_code == 200, plain.text
    assert HEADER not in plain.headers
    assert strict.http.post(path, json=body).status_code == 200
    more = server.http.post(path, json=body | {"colour": "red"})
    assert (more.status_code, more.headers[HEADER]) == (200, "colour")
    assert "usage" not in more.json() or more.json()["usage"] == plain.json()["usage"]
    refused = strict.http.post(path, json=body | {"colour": "red"})
    assert refused.status_code == 400
    assert "colour is not a known field" in refused.text
    compressed = gzip.compress(json.dumps(body).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert server.http.post(path, content=compressed, headers=headers).status_code == 200


PARTS: list[tuple[Any, dict[str, Any]]] = [
    ("x", TEXT),
    ({"text": "x"}, TEXT),
    ({"type": "input_text", "text": "x"}, TEXT),
    ({"type": "output_text", "text": "x", "annotations": []}, TEXT),
    ({"type": "refusal", "refusal": "x"}, TEXT),
    ({"image_url": {"url": URL}}, IMAGE),
    ({"type": "input_image", "image_url": URL, "detail": "auto"}, IMAGE),
    ({"type": "image", "image": URL}, IMAGE),
]


@pytest.mark.parametrize(("part", "meant"), PARTS, ids=[json.dumps(part)[:40] for part, _ in PARTS])
def test_parts_in_the_forms_of_others_are_read(
    server: Server, strict: Server, part: Any, meant: dict[str, Any]
) -> None:
    expected = server.http.post("/v1/chat/completions", json=user(TEXT, meant)).json()
    response = server.http.post("/v1/chat/completions", json=user(TEXT, part))
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == expected["choices"]
    refusal(strict.http.post("/v1/chat/completions", json=user(TEXT, part)), 400)


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "sound"}, "messages[0].content[0].type"),
        ({"x": "y"}, "messages[0].content[0].type"),
        ({"text": "x", "image_url": URL}, "messages[0].content[0].type"),
        (["text"], "messages[0].content[0]"),
        ({"type": "image", "image": {"odd": 1}}, "messages[0].content[0].type"),
        ({"type": "refusal"}, "messages[0].content[0].text"),
        ({"type": "text", "text": 3, "odd": 1}, "messages[0].content[0].text"),
    ],
    ids=str,
)
def test_parts_that_are_nothing_are_refused_by_name(server: Server, part: Any, param: str) -> None:
    assert (refusal(server.http.post("/v1/chat/completions", json=user(part)), 400)["param"] or "").startswith(param)


@pytest.mark.parametrize("body", [b"[1]", b'"x"', b"5", b"null", b'{"x": 1', b'{"x": 1}'])
def test_bodies_that_are_no_request_are_refused_as_before(server: Server, body: bytes) -> None:
    refusal(server.http.post("/v1/chat/completions", content=body), 400)


def test_a_header_is_bounded(server: Server) -> None:
    body = user(TEXT) | {f"field{number:03}" + "x" * 100: 1 for number in range(300)}
    value = server.http.post("/v1/chat/completions", json=body).headers[HEADER]
    assert len(value) <= MAX_HEADER + 5
    assert value.endswith(", ...")
    assert all(len(name) <= 64 for name in value.split(", "))


def test_an_unknown_field_costs_no_second_copy_of_the_media() -> None:
    """Megabytes of base64 are decoded once more, but never kept twice."""
    url = "data:image/png;base64," + "A" * 8_000_000
    body = json.dumps(user({"type": "image_url", "image_url": {"url": url}}) | {"odd": 1}).encode()
    peaks = []
    for decoded in (lambda: msgspec.json.decode(body), lambda: decode(body, ChatRequest, [])):
        tracemalloc.start()
        kept = decoded()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    assert peaks[1] < 1.1 * peaks[0]


def test_the_log_names_each_field_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("service.unknown_fields.time.monotonic", lambda: now[0])
    warnings = Warnings()

    def logged(*names: str) -> str:
        caplog.clear()
        with caplog.at_level("WARNING", "flashserve.request"):
            warnings.warn(names)
        return caplog.records[0].getMessage().rpartition(": ")[2] if caplog.records else ""

    assert logged("a", "messages[0].b") == "a, messages[].b"
    assert logged("a", "messages[7].b") == ""
    assert logged("messages[7].b", "c", "c") == "c"
    now[0] = WARN_AGAIN
    assert logged("a") == "a"
    assert logged(*(f"x{number}" for number in range(2 * MAX_WARNED))).count("x") <= MAX_WARNED
    assert logged("d") == "", "there were too many"
    now[0] = 3 * WARN_AGAIN
    assert logged("d") == "d"


def test_values_are_not_logged(server: Server) -> None:
    body = user(TEXT) | {"pass_word": "hunter2"}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    assert "unknown fields of requests are ignored (--strict refuses them): pass_word" in server.log_text()
    assert "hunter2" not in server.log_text()


def test_only_bodies_that_fail_are_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all clients send costs nothing more."""
    monkeypatch.setattr(unknown_fields, "_Cleaner", None)
    assert decode(json.dumps(user(TEXT, IMAGE)).encode(), ChatRequest, []).messages
    with pytest.raises(TypeError):
        decode(json.dumps(user(TEXT) | {"odd": 1}).encode(), ChatRequest, [])
