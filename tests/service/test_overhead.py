"""The client that measures the service: it reads streams as real ones do, and takes no half answer for a whole one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from model.request import Medium, Message, SamplingParams
from service.commands.overhead import _encoded, _receive_all, _request, _token_ids
from tests.service.server import Server

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"type":"token","text":"a","tokens":[{"id":%d,"text":"a","source":"draft"}]}\n\n'
DONE = b'data: {"type":"done","text":"aa","timings":{}}\n\n'
END = b"0\r\n\r\n"
PARAMS = SamplingParams(max_tokens=12)


def chunks(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies)


def asked(url: str, number: int) -> bytes:
    picture = np.full((1, 24, 24, 3), number, dtype=np.uint8)
    file, question = _encoded([Message("user", (Medium("image", picture), "What is it?"))])
    return _request(url, file, question, PARAMS, number)


async def stream_all(url: str, requests: Sequence[bytes], streams: int) -> list[list[int]]:
    return [_token_ids(answer) for answer in await _receive_all(url, requests, streams)]


def answers_to(replies: Sequence[bytes], *, streams: int = 1) -> list[list[int]]:
    """What the client makes of a server that gives these replies, whoever asks, and then hangs up."""

    async def both() -> list[list[int]]:
        left = list(replies)

        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while left:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(left.pop(0))
            writer.close()

        async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await stream_all(url, [asked(url, number) for number in range(len(replies))], streams)

    return asyncio.run(both())


def test_one_connection_carries_one_answer_after_another():
    first, second = chunks(TOKEN % 1, TOKEN % 2, DONE), chunks(TOKEN % 3, DONE)
    assert answers_to([HEAD + first + END, HEAD + second + END]) == [[1, 2], [3]]


def test_chunks_need_not_be_events():
    stream = TOKEN % 1 + TOKEN % 2 + DONE
    cut = len(TOKEN) + 7
    assert answers_to([HEAD + chunks(stream[:cut], stream[cut:]) + END]) == [[1, 2]]


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull", "503 Service Unavailable: full"),
        (HEAD + chunks(TOKEN % 1, b'data: {"error":{"message":"it died"}}\n\n', b"data: [DONE]\n\n") + END, "it died"),
        (HEAD + chunks(TOKEN % 1) + END, "before it was done"),
        (HEAD + chunks(TOKEN % 1), "in the middle of an answer"),
        (HEAD + chunks(TOKEN % 1, DONE), "in the middle of an answer"),
        (b"", "in the middle of an answer"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(reply: bytes, complaint: str):
    with pytest.raises(OSError, match=complaint):
        answers_to([reply])


def test_a_real_server_gives_the_ids_it_gives_to_others(server: Server):
    requests = [asked(server.url, number) for number in range(6)]
    answers = asyncio.run(stream_all(server.url, requests, 3))
    assert [len(ids) for ids in answers] == [PARAMS.max_tokens] * 6
    assert answers == asyncio.run(stream_all(server.url, requests, 1))
    assert len(set(map(tuple, answers))) == 6
