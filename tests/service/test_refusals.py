"""Requests whose fields, media or forms are invalid: OpenAI's envelope, the right status, the field's name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.service.refusals import MULTIPART, URLENCODED, USER, image, png, refusal
from tests.service.server import Server


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
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
        ({"messages": [USER] * 3000}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "sound"}]}]}, "messages[1].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 1_200_000}]}, "messages"),
        ({"speculation": "on"}, "speculation"),
        ({"num_frames": 4, "fps": 1}, "fps"),
        ({"num_frames": 4}, "num_frames"),
        ({"num_frames": 10_000}, "num_frames"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_fields_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(server.chat(**fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field",
    [
        {"modalities": ["audio"]},
        {"moderation": {}},
        {"moderation": {"model": "omni-moderation-latest"}},
    ],
)
def test_what_is_not_built_yet_is_refused_and_not_ignored(server: Server, field: dict[str, Any]) -> None:
    (name,) = field
    error = refusal(server.chat(**field), 400)
    assert (error["param"], error["code"]) == (name, "not_built")


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
    "content", ["x" * 1_200_000, "word " * 3000, [{"type": "text", "text": "x" * 600_000}] * 2], ids=len
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
    assert error["param"] == "messages[0].content[0]" + ("" if url else ".image_url")
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
        ({"prompt": "x" * 1_200_000}, "prompt"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": "nan"}, "temperature"),
        ({"prompt": "x", "max_tokens": "1e9"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "99999999"}, "max_tokens"),
        ({"prompt": "x", "n": "2"}, "n"),
        ({"prompt": "x", "stream": "maybe"}, "stream"),
        ({"prompt": ["x", "y"]}, "prompt"),
        ({"prompt": "x", "media": "not a file"}, "media"),
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
