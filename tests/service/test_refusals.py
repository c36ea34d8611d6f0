"""What a server does not take, and how it says so: OpenAI's envelope, the right status, the field's name."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from starlette.routing import Route

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import StartServer
from tests.service.server import Server, chat_body


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def png(width: int = 60, height: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(file, "PNG")
    return file.getvalue()


def connected(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


USER = {"role": "user", "content": "hi"}
URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 1000}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [USER] * 1000}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "sound"}]}]}, "messages[1].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "messages"),
        ({"speculation": "on"}, "speculation"),
        ({"num_frames": 4, "fps": 1}, "fps"),
        ({"num_frames": 4}, "num_frames"),
        ({"num_frames": 10_000}, "num_frames"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"colour": "red"}, "colour"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ],
)
def test_wrong_fields_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(server.chat(**fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "minimal"},
        {"moderation": {}},
        {"moderation": {"model": "omni-moderation-latest"}},
    ],
)
def test_what_is_not_built_yet_is_refused_and_not_ignored(server: Server, field: dict[str, Any]) -> None:
    (name,) = field
    error = refusal(server.chat(**field), 400)
    assert (error["param"], error["code"]) == (name, "not_built")


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "refusal"),
        ({"role": "tool", "content": "x"}, "role"),
        ({"role": "tool", "tool_call_id": "call_1", "content": "x"}, "role"),
        ({"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "x"}]}, "role"),
        ({"role": "function", "name": "f", "content": "x"}, "role"),
        ({"role": "user", "tool_call_id": "call_1", "content": "x"}, "tool_call_id"),
    ],
    ids=str,
)
def test_messages_of_conversations_with_tools_are_refused_by_name(
    server: Server, message: dict[str, Any], field: str
) -> None:
    """As not built, which a client can act on, and not as a mistake in a type."""
    error = refusal(server.chat(messages=[USER, message, USER]), 400)
    assert (error["code"], error["param"]) == ("not_built", f"messages[1].{field}")
    assert error["message"].startswith(f"messages[1].{field} ")
    assert "is not built yet; " in error["message"]


@pytest.mark.parametrize(
    ("bias", "named"),
    [
        ({"not_a_token_id": 50}, "'not_a_token_id' is not a token id"),
        ({"5": 1, "a": 1, "": 1}, "'a', '' are not token ids"),
        ({"1.5": 1}, "'1.5' is not"),
        ({"-1": 1}, "'-1' is not"),
        ({"05": 1}, "'05' is not"),
        ({"٣": 1}, "'٣' is not"),
        ({"9" * 5000: 1}, "'" + "9" * 64 + "' is not"),
        ({f"t{i}": 1 for i in range(20)}, "'t6', 't7' and 12 more are not"),
        ({"5": 101}, "a bias is a number from -100 to 100; that of '5' is not"),
        ({"5": 1, "6": -100.5, "7": 1e300}, "that of '6', '7' is not"),
        ({"5": "much"}, "that of '5' is not"),
        ({"5": None, "6": True, "7": [1]}, "that of '5', '6', '7' is not"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_bias_is_named_by_its_key(server: Server, bias: dict[str, Any], named: str) -> None:
    form = {"prompt": "x", "logit_bias": json.dumps(bias)}
    for response in (server.chat(logit_bias=bias), server.http.post("/v1/generate", data=form)):
        error = refusal(response, 400)
        assert error["param"] == "logit_bias"
        assert error["message"].startswith("logit_bias: ")
        assert named in error["message"]


@pytest.mark.parametrize(
    "content", ["x" * 40_000, "word " * 3000, [{"type": "text", "text": "x" * 20_000}] * 2], ids=len
)
def test_a_prompt_that_is_too_long_says_so_in_the_words_that_clients_know(server: Server, content: object) -> None:
    """litellm and LangChain look for "prompt is too long" in the message, and fall back to another model."""
    error = refusal(server.chat(messages=[{"role": "user", "content": content}]), 400)
    assert "prompt is too long" in error["message"]
    assert error["code"] in ("prompt_too_long", "context_length_exceeded")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
    ],
)
def test_options_out_of_range_are_refused_by_name(server: Server, field: dict[str, Any], param: str) -> None:
    assert refusal(server.chat(**field), 400)["param"].split("[")[0] == param
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in field.items()}
    if param != "logprobs":  # a form's text says nothing of its type
        assert refusal(server.http.post("/v1/generate", data={"prompt": "x", **form}), 400)["param"].startswith(param)


@pytest.mark.parametrize("value", ["[" * 5000, "{", "5", '{"a": {"b": 1}}'])
def test_a_forms_bias_that_is_no_object_of_numbers_is_refused(server: Server, value: str) -> None:
    response = server.http.post("/v1/generate", data={"prompt": "x", "logit_bias": value})
    assert refusal(response, 400)["param"].startswith("logit_bias")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b"[1]", b'"x"', b"\xff\xfe", b'{"messages":"\\ud800"}', b'{"logit_bias":' + b"[" * 10**5],
)
def test_bodies_that_are_no_request_are_a_400(server: Server, body: bytes) -> None:
    refusal(server.http.post("/v1/chat/completions", content=body), 400)


def image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:image/png;base64,AAAA", 415),
        ("data:image/png;base64,", 400),
        ("data:image/png;base64,!!!", 400),
        ("http://169.254.169.254/latest", 400),
        ("https://example.com/a.png", 400),
        ("file:///etc/passwd", 400),
        ("", 400),
    ],
)
def test_media_that_cannot_be_had_are_refused_and_named(server: Server, url: str, status: int) -> None:
    error = refusal(server.http.post("/v1/chat/completions", json=image(url)), status)
    assert error["param"] == "messages[0].content[0]"
    assert "passwd" not in error["message"]


UNREAD = {
    "TIFF": (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"MM\0+\0\x08\0\0"),
    "JPEG XL": (b"\xff\x0a\0\0", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?>\n<svg/>",
        b"\xef\xbb\xbf <!-- a -->\n<SVG/>",
    ),
    "PDF": (b"%PDF-1.7\n",),
    "HTML": (b"\n<!DOCTYPE html><html>", b"<html>"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_formats_that_are_not_read_are_refused_by_their_names(server: Server, name: str) -> None:
    for data in UNREAD[name]:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        by_url = refusal(server.http.post("/v1/chat/completions", json=image(url)), 415)
        files = [("media", ("x.png", data))]
        by_form = refusal(server.http.post("/v1/generate", data={"prompt": "x"}, files=files), 415)
        for error in (by_url, by_form):
            assert f"{name} is not supported; send JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC" in error["message"]


def test_media_belong_to_users(server: Server) -> None:
    body = image("data:,")
    body["messages"][0]["role"] = "system"
    assert refusal(server.http.post("/v1/chat/completions", json=body), 400)["param"] == "messages[0].content"


def test_too_many_media_are_refused_before_any_is_looked_at(server: Server) -> None:
    body = image("nonsense")
    body["messages"][0]["content"] *= 100
    assert refusal(server.http.post("/v1/chat/completions", json=body), 400)["code"] == "too_many_media"
    files = [("media", ("x", b"nonsense"))] * 9
    assert refusal(server.http.post("/v1/generate", data={"prompt": "x"}, files=files), 400)["code"] == "too_many_media"


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": "nan"}, "temperature"),
        ({"prompt": "x", "max_tokens": "1e9"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "99999999"}, "max_tokens"),
        ({"prompt": "x", "n": "2"}, "n"),
        ({"prompt": "x", "stream": "maybe"}, "stream"),
        ({"prompt": ["x", "y"]}, "prompt"),
        ({"prompt": "x", "media": "not a file"}, "media"),
        ({"prompt": "x", "colour": "red"}, "colour"),
        ({"prompt": "x", "fps": "1"}, "fps"),
        ({"prompt": "x", "model": "gpt-4"}, "model"),
    ],
)
def test_wrong_form_fields_are_named(server: Server, data: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/generate", data=data, files={"ignored": b""} if not data else None)
    assert refusal(response, 404 if param == "model" else 400)["param"] == (param if data else "ignored")


def test_the_native_route_wants_a_form(server: Server) -> None:
    assert refusal(server.http.post("/v1/generate", json={"prompt": "x"}), 415)["param"] == "content-type"
    for body, kind in ((b"--x\r\nnonsense", MULTIPART), (b"", "multipart/form-data")):
        refusal(server.http.post("/v1/generate", content=body, headers={"content-type": kind}), 400)


def test_no_librarys_words_are_in_a_refusal(server: Server) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="media"; filename="gr\xfc\xdfe.png"\r\n\r\nx\r\n--x--\r\n'
    for sent in (body, b"--x\r\nnonsense"):
        response = server.http.post("/v1/generate", content=sent, headers={"content-type": MULTIPART})
        error = refusal(response, 400)
        assert (error["code"], error["message"]) == ("invalid_form", "the form is malformed, or has more than 72 parts")


@pytest.mark.parametrize("parts", [10, 1000])
def test_forms_of_many_parts_or_long_texts_are_refused(server: Server, parts: int) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="media"; filename="f"\r\n\r\nx\r\n'
    prompt = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhi\r\n'
    body = prompt + head * parts + b"--x--\r\n"
    kind = {"content-type": MULTIPART}
    code = refusal(server.http.post("/v1/generate", content=body, headers=kind), 400)["code"]
    assert code in ("too_many_media", "invalid_form")
    text = head.replace(b'; filename="f"', b"") + b"y" * 5_000_000 + b"\r\n--x--\r\n"
    assert refusal(server.http.post("/v1/generate", content=text, headers=kind), 413)["code"] == "too_much_text"
    many = "&".join(f"f{i}=1" for i in range(1000))
    for answer in (many, "prompt=a&prompt=b"):
        refusal(server.http.post("/v1/generate", content=answer, headers={"content-type": URLENCODED}), 400)


def test_text_alone_may_come_as_any_form_says_it(server: Server) -> None:
    told = [
        server.http.post("/v1/generate", data={"prompt": "grüße & mehr", "max_tokens": 4}),
        server.http.post("/v1/generate", files={"prompt": (None, "grüße & mehr"), "max_tokens": (None, "4")}),
    ]
    assert [answer.status_code for answer in told] == [200, 200]
    assert told[0].json()["text"] == told[1].json()["text"]


def test_text_that_is_no_unicode_is_refused_and_leaves_nothing_behind(server: Server) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xed\xa0\x80\r\n--x--\r\n'
    for text, kind in ((body, MULTIPART), (b"prompt=%ED%A0%80", URLENCODED)):
        response = server.http.post("/v1/generate", content=text, headers={"content-type": kind})
        assert refusal(response, 400)["code"] == "invalid_text"
    assert server.health()["workers"][0]["requests"] == 0


@pytest.mark.parametrize(
    ("data", "status"), [(b"", 400), (b"plain text", 415), (png()[:60], 400), (png(20, 60_000), 413)]
)
def test_files_that_are_no_good_are_refused(server: Server, data: bytes, status: int) -> None:
    response = server.http.post("/v1/generate", data={"prompt": "x"}, files={"media": ("a.png", data, "image/png")})
    assert refusal(response, status)["param"] == "media"


def test_unknown_routes_and_methods_have_the_envelope_too(server: Server) -> None:
    assert refusal(server.http.get("/v1/nothing"), 404)["code"] == "not_found"
    for path, method, allowed in (("/v1/chat/completions", "GET", {"POST"}), ("/v1/models", "POST", {"GET", "HEAD"})):
        response = server.http.request(method, path)
        assert refusal(response, 405)["code"] == "method_not_allowed"
        assert set(response.headers["allow"].split(", ")) == allowed
    for path in ("/v1/chat/completions/", "/v1/generate//", "/v1/models/", "/livez/", "/static/app.js/", "/nothing/"):
        method = "POST" if path[:5] in ("/v1/c", "/v1/g") else "GET"
        response = server.http.request(method, path, headers={"Host": "elsewhere"})
        error = refusal(response, 404)
        assert "location" not in response.headers, "a body, and a key with it, went to whatever host was named"
        assert (f"there is at {path.rstrip('/')}," in error["message"]) == (path != "/nothing/")
    assert refusal(server.http.get("/static/../settings.py"), 404)["code"] == "not_found"
    assert refusal(server.http.get("/static/%2e%2e%2fsettings.py"), 404)["code"] == "not_found"


def test_a_body_over_the_limit_is_a_413_declared_or_not(start_server: StartServer) -> None:
    server = start_server(max_body_bytes=2_000_000, max_media_bytes=500_000)
    big = b"x" * 8_000_000
    for path, kind in (
        ("/v1/chat/completions", "application/json"),
        ("/v1/generate", MULTIPART),
    ):
        headers = {"content-type": kind}
        assert refusal(server.http.post(path, content=big, headers=headers), 413)["code"] == "body_too_large"
        pieces = (big[i : i + 100_000] for i in range(0, len(big), 100_000))
        prefix = (
            b'{"messages":"'
            if "json" in kind
            else b'--x\r\nContent-Disposition: form-data; name="media"; filename="f"\r\n\r\n'
        )
        chunked = server.http.post(path, content=(piece for piece in (prefix, *pieces)), headers=headers)
        assert refusal(chunked, 413)["code"] == "body_too_large"
    medium = server.http.post("/v1/generate", data={"prompt": "x"}, files={"media": big[:1_000_000]})
    assert refusal(medium, 413)["code"] == "too_many_bytes"
    assert server.chat(max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("generate", URLENCODED, b"prompt=" + b"%41" * 5_000_000),
        ("chat/completions", "application/json", b'{"messages":[],"metadata":[' + b"[]," * 5_000_000 + b"[]]}"),
        ("chat/completions", "application/json", b'{"messages":[],"stop":[' + b'"a",' * 4_000_000 + b'"a"]}'),
        ("chat/completions", "application/json", b'{"messages":[],"user":[' + b'"data:",' * 2_000_000 + b'"a"]}'),
        ("chat/completions", "application/json", b'{"messages":[],"user":"data:' + b"a" * 16_000_000 + b'\xc3\xa4"}'),
    ],
    ids=["escapes", "lists", "strings", "media that are none", "a medium that is none"],
)
def test_text_that_would_fill_the_memory_is_not_parsed(server: Server, path: str, kind: str, body: bytes) -> None:
    """Of 60 MB each a parser made gigabytes, and held up every stream for ten seconds."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.http.post, f"/v1/{path}", content=body, headers={"content-type": kind})
        most = before
        while not asked.done():
            most = max(most, process.memory_info().rss)
    assert refusal(asked.result(), 413)["code"] in ("too_much_text", "body_too_large")
    assert most - before < 3 * len(body)


@pytest.mark.parametrize(
    ("start", "escaped"),
    [("data:", "data:"), ("DATA:", "DATA:"), (" Data:", "\\u0020Data:"), ("data:", "\\u0064at\\u0061\\u003A")],
)
def test_media_are_no_text_however_a_uri_begins(server: Server, start: str, escaped: str) -> None:
    """One reading for limits and content: in upper case it was text to the one, and a medium to the other."""
    file = png() + bytes(1_000_000)
    body = json.dumps(image(f"{start}image/png;base64," + base64.b64encode(file).decode()) | {"max_tokens": 1})
    body = body.replace(start, escaped).replace("/", "\\/")  # as PHP writes it
    assert server.http.post("/v1/chat/completions", content=body).status_code == 200


def test_media_are_no_text_whatever_a_prompt_says_of_them(server: Server) -> None:
    noise = Image.frombytes("RGB", (600, 600), random.Random(0).randbytes(3 * 600 * 600))
    file = io.BytesIO()
    noise.save(file, "PNG")
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": '<img src="data:image/png;base64,AAAA">, as "data: URIs" are called'}
    ]
    for _ in range(2):
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    assert refusal(server.chat(user="data:" + "x" * 3_000_000 + '"' + "x" * 600_000), 413)["code"] == "too_much_text"


def test_what_an_error_quotes_is_cut(server: Server) -> None:
    body = {"messages": [{"role": "data:" + "a" * 1_000_000, "content": ""}]}
    error = refusal(server.http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "messages[0].role"
    assert len(error["message"]) < 1000
    error = refusal(server.http.post("/v1/chat/completions", json={"messages": [], "x" * 100_000: 1}), 400)
    assert (error["param"], error["code"]) == ("x" * 64, "unknown_field")


def test_the_parts_of_all_messages_are_counted(server: Server) -> None:
    """A worker took seconds for millions of empty ones, and let everybody else wait."""
    part = {"type": "text", "text": ""}
    messages = [{"role": "user", "content": [part] * 1022}, USER, USER]
    assert server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
    error = refusal(server.http.post("/v1/chat/completions", json={"messages": [*messages, USER]}), 400)
    assert error["param"] == "messages"
    assert "1024" in error["message"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 400_000,
        b"GET /" + b"a" * 400_000,
        b"GET /livez HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    ],
    ids=["one header", "url", "many headers"],
)
def test_a_giant_head_is_cut_off(server: Server, head: bytes) -> None:
    with connected(server) as sock:
        try:
            sock.sendall(head)
            said = sock.recv(4096)
            assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"
        except (BrokenPipeError, ConnectionResetError):
            pass  # it did not even wait for the end
    assert server.http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET /v1/models\r\n\r\n",
        b"GET /livez HTTP/0.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/0.9\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
    ids=[
        "large head",
        "nonsense",
        "0.9",
        "0.9 named",
        "0.9 with a body",
        "2.0",
        "2.0 at once",
        "TLS",
        "CONNECT",
        "two lengths",
        "no chunk",
    ],
)
def test_what_is_no_http_has_the_envelope_too(server: Server, sent: bytes) -> None:
    with connected(server) as sock:
        sock.sendall(sent)
        response = http.client.HTTPResponse(sock)
        response.begin()
        error = json.loads(response.read())["error"]
        assert (response.status, response.headers["content-type"]) == (400, "application/json")
        assert error["code"] == ("head_too_large" if len(sent) > 10_000 else "invalid_http")
        assert sock.recv(1) == b""


def test_nothing_is_said_into_an_answer_that_is_under_way(server: Server) -> None:
    body = json.dumps(chat_body(stream=True, max_tokens=2000, ignore_eos=True)).encode()
    with connected(server) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        said = sock.recv(100)
        sock.sendall(b"nonsense\r\n\r\n")
        while more := sock.recv(1 << 16):
            said += more
    assert b"invalid_http" not in said
    assert said.count(b"HTTP/1.1") == 1


def test_a_head_that_never_ends_does_not_keep_its_connection(start_server: StartServer) -> None:
    """Thousands of them took every file descriptor that the process may have."""
    server = start_server({"delay": 0.02}, head_timeout=1)
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    for begun in (b"", b"GET /livez HTTP/1.1\r\nX: ", request, request + b"\r\n"):
        with connected(server) as sock:
            sock.sendall(begun)
            since = time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):
                while time.monotonic() < since + 5:
                    if begun and begun != request:
                        sock.sendall(b"\r\n" if begun.startswith(request) else b"a")
                    sock.settimeout(0.1)
                    with suppress(TimeoutError):
                        if not sock.recv(4096):
                            break
            assert 0.5 < time.monotonic() - since < 3, begun
    # A request that takes longer than its head may is nobody's concern.
    assert server.chat(max_tokens=100, speculation="off", ignore_eos=True).elapsed.total_seconds() > 1.5


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pause", [False, True])
def test_an_offer_of_another_protocol_is_passed_over(server: Server, chunked: bool, pause: bool) -> None:
    """Java's HTTP client makes one to every server. The body was lost, or read as the next request."""
    body = json.dumps(chat_body("GET /version HTTP/1.1\r\n\r\n", max_tokens=3)).encode()
    length = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with connected(server) as sock:
        for _ in range(2):  # the connection stays
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + OFFER + length + b"\r\n")
            if pause:
                time.sleep(0.1)
            sock.sendall(sent)
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert response.status == 200, response.read()
            assert json.loads(response.read())["usage"]["completion_tokens"] == 3
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_many_offers_at_once_are_each_passed_over(server: Server) -> None:
    """And though it is more than one head may be."""
    count = 2000
    with connected(server) as sock:
        sock.sendall((b"GET /version HTTP/1.1\r\nHost: x\r\n" + OFFER + b"\r\n") * count)
        sock.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = b""
        while more := sock.recv(1 << 16):
            said += more
    assert said.count(b"HTTP/1.1 200 OK\r\n") == count
    assert said.count(b"HTTP/1.1 404 Not Found\r\n") == 1


def test_every_answer_of_a_post_route_has_an_id_that_the_log_has_too(start_server: StartServer) -> None:
    server = start_server(api_key="key", max_num_seqs=1, max_waiting=0)
    key = {"Authorization": "Bearer key"}
    chat, form = {"messages": [USER], "max_tokens": 1}, {"prompt": "hi", "max_tokens": "1"}
    logged: list[str] = []
    for path, good, bad in (
        ("/v1/chat/completions", {"json": chat}, {"json": {"messages": []}}),
        ("/v1/chat/completions", {"json": chat | {"stream": True}}, {"content": b"{"}),
        ("/v1/generate", {"data": form}, {"data": {"prompt": ""}}),
        ("/v1/generate", {"data": form | {"stream": "true"}}, {"data": form | {"colour": "red"}}),
    ):
        for fields, headers, status in ((good, key, 200), (bad, key, 400), (good, {}, 401)):
            response = server.http.post(path, headers=headers, **fields)
            assert response.status_code == status, response.text
            assert response.headers["x-request-id"].startswith("chatcmpl-" if "chat" in path else "gen-")
            if status != 401:
                logged.append(f"id={response.headers['x-request-id']} ")
    server.wait(lambda: all(line in server.log_text() for line in logged))
    long = chat_body(stream=True, max_tokens=2000, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=long, headers=key) as running:
        lines = running.iter_lines()
        next(lines)
        full = server.http.post("/v1/chat/completions", json=chat, headers=key)
        assert refusal(full, 503)["code"] == "queue_full"
        assert full.headers["x-request-id"] != running.headers["x-request-id"]


def test_refusals_are_counted_by_reason(server: Server) -> None:
    before = server.metric("flash_requests_rejected_total", reason="not_built")
    server.chat(tools=[{"type": "function"}])
    assert server.metric("flash_requests_rejected_total", reason="not_built") == before + 1


def test_with_keys_every_v1_route_wants_one_and_the_others_do_not(start_server: StartServer) -> None:
    server = start_server(api_key="first,second")
    requests = [("POST", "/v1/chat/completions"), ("POST", "/v1/generate")]
    requests += [("GET", "/v1/models"), ("GET", "/v1/models/demo")]
    routes = {route.path for route in create_app(Settings(), on_fatal=print).routes if isinstance(route, Route)}
    assert {path for path in routes if path.startswith("/v1")} == {
        path.replace("demo", "{name:path}") for _, path in requests
    }, "a /v1 route that this test does not know"
    for method, path in requests:
        for header in (None, "Bearer wrong", "Bearer", "Basic first", "Bearer \xfc"):
            headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
            error = refusal(server.http.request(method, path, headers=headers), 401)
            assert error["type"] == "authentication_error"
    for key in ("first", "second"):
        assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/livez", "/readyz", "/health", "/metrics", "/version", "/", "/static/app.js"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/health", headers={"Authorization": "Bearer wrong"}).json() == {"status": "ready"}
    assert "workers" in server.http.get("/health", headers={"Authorization": "Bearer second"}).json()
    assert "first" not in server.log_text()


def test_a_keys_own_limit_is_a_429_and_leaves_other_keys_alone(start_server: StartServer) -> None:
    server = start_server(api_key="first,second", max_requests_per_key=1)
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    body = chat_body(stream=True, max_tokens=2000, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers=first) as running:
        lines = running.iter_lines()
        next(lines)
        again = server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=first)
        assert refusal(again, 429)["type"] == "rate_limit_error"
        assert server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1), headers=second).is_success
    server.http.headers.update(first)
    server.wait(lambda: server.health()["requests"] == 0)
    assert server.chat(max_tokens=1).is_success
