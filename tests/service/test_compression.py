"""Compressed bodies are read as if they were not, within the same limits."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.compression import PIECE, Decompressor
from service.errors import BadRequest
from tests.media.samples import encoded, picture
from tests.service.refusals import MULTIPART, URLENCODED, refusal
from tests.service.server import Server, chat_body

BODY = json.dumps(chat_body("Grüße " * 50, max_tokens=3)).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, {"max_body_bytes": 4 << 20})
        yield server
        assert server.close() == 0, server.log_text()


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def members(data: bytes) -> bytes:
    return gzip.compress(data[:100]) + gzip.compress(data[100:])


WAYS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("x-gzip", gzip.compress),
    ("gzip", members),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("identity", bytes),
    ("", bytes),
]
IDS = [f"{encoding} {way.__name__}" for encoding, way in WAYS]


def chat(server: Server, body: bytes | Iterator[bytes], encoding: str) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return server.http.post("/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize(("encoding", "compress"), WAYS, ids=IDS)
def test_a_compressed_body_is_read(server: Server, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    expected = server.http.post("/v1/chat/completions", content=BODY).json()["choices"]
    sent = compress(BODY)
    for body in (sent, (sent[at : at + 7] for at in range(0, len(sent), 7))):
        response = chat(server, body, encoding)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == expected


def test_so_is_a_form(server: Server) -> None:
    picture_file = encoded(picture(40, 30), "PNG")
    request = server.http.build_request(
        "POST", "/v1/generate", data={"prompt": "x", "max_tokens": "2"}, files={"media": picture_file}
    )
    body, kind = request.read(), request.headers["content-type"]
    expected = server.http.post("/v1/generate", content=body, headers={"content-type": kind}).json()["text"]
    headers = {"content-type": kind, "content-encoding": "gzip"}
    assert server.http.post("/v1/generate", content=gzip.compress(body), headers=headers).json()["text"] == expected
    headers["content-type"] = URLENCODED
    text = server.http.post("/v1/generate", content=gzip.compress(b"prompt=x&max_tokens=2"), headers=headers)
    assert text.status_code == 200


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, identity", "gzip, gzip", "compress", "x" * 500])
def test_other_encodings_are_refused_by_name(server: Server, encoding: str) -> None:
    for path, kind in (("chat/completions", "application/json"), ("generate", URLENCODED), ("generate", MULTIPART)):
        headers = {"content-encoding": encoding, "content-type": kind}
        error = refusal(server.http.post(f"/v1/{path}", content=BODY, headers=headers), 415)
        assert (error["code"], error["param"]) == ("unsupported_encoding", "content-encoding")
        assert encoding[:32] in error["message"]


@pytest.mark.parametrize(
    "body",
    [BODY, gzip.compress(BODY)[:-1], gzip.compress(BODY)[:40], gzip.compress(BODY) + b"more", zlib.compress(BODY)[:-9]],
    ids=["not compressed", "no last byte", "cut", "rubbish behind", "zlib, cut"],
)
def test_a_body_that_cannot_be_decompressed_is_a_400(server: Server, body: bytes) -> None:
    for encoding in ("gzip", "deflate"):
        error = refusal(chat(server, body, encoding), 400)
        assert (error["code"], error["param"]) == ("invalid_encoding", "content-encoding")
        assert f"the body is not valid {encoding}" in error["message"]


def test_a_bomb_is_refused_at_the_limit(server: Server) -> None:
    """4 MiB are allowed; a few kilobytes hold a gigabyte."""
    stream = zlib.compressobj(9, wbits=31)
    bomb = b"".join(stream.compress(bytes(1 << 20)) for _ in range(1024)) + stream.flush()
    for body in (bomb, gzip.compress(bytes(5 << 20)), (bomb[at : at + 1000] for at in range(0, len(bomb), 1000))):
        assert refusal(chat(server, body, "gzip"), 413)["code"] == "body_too_large"
    assert server.chat().status_code == 200


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, PIECE + 258, 3 * PIECE])
def test_pieces_are_small_and_none_is_lost(size: int) -> None:
    """Where a piece is full exactly, zlib may keep more of it for the next call."""
    rng = random.Random(size)
    for data in (rng.randbytes(size), bytes(size), (b"abc" * (size // 3 + 1))[:size]):
        for compress, step in ((gzip.compress, len(data) + 100), (raw_deflate, 1000)):
            sent = compress(data)
            decompressor = Decompressor("deflate" if compress is raw_deflate else "gzip")
            pieces = [piece for at in range(0, len(sent), step) for piece in decompressor.feed(sent[at : at + step])]
            decompressor.finish()
            assert max(map(len, pieces), default=0) <= PIECE
            assert b"".join(pieces) == data


def test_what_is_cut_anywhere_is_noticed() -> None:
    sent = gzip.compress(BODY)
    for end in range(1, len(sent)):
        decompressor = Decompressor("gzip")
        list(decompressor.feed(sent[:end]))
        with pytest.raises(BadRequest):
            decompressor.finish()
