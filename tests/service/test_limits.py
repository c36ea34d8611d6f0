"""Bodies and texts that are too large or have too many parts; what counts as media."""

from __future__ import annotations

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.service.conftest import StartServer
from tests.service.refusals import MULTIPART, URLENCODED, USER, image, png, refusal
from tests.service.server import Server


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
    assert refusal(server.chat(user="data:" + "x" * 3_000_000 + '"' + "x" * 2_400_000), 413)["code"] == "too_much_text"


def test_what_an_error_quotes_is_cut(server: Server) -> None:
    body = {"messages": [{"role": "data:" + "a" * 1_000_000, "content": ""}]}
    error = refusal(server.http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "messages[0].role"
    assert len(error["message"]) < 1000
    response = server.http.post("/v1/chat/completions", json={"messages": [], "x" * 100_000: 1})
    assert refusal(response, 400)["param"] == "messages"
    assert response.headers["x-flashserve-ignored"] == "x" * 64


def test_the_parts_of_all_messages_are_counted(server: Server) -> None:
    """A worker took seconds for millions of empty ones, and let everybody else wait."""
    part = {"type": "text", "text": ""}
    messages = [{"role": "user", "content": [part] * 4094}, USER, USER]
    assert server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
    error = refusal(server.http.post("/v1/chat/completions", json={"messages": [*messages, USER]}), 400)
    assert error["param"] == "messages"
    assert "4096" in error["message"]
