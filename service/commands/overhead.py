"""What HTTP and streaming cost: the same prompts answered by a real server over HTTP, and by the engine in process.

Both keep the same number of requests going until all are answered, with the same engine options. The client that
reads the streams shares the machine with the server; what it costs counts against the service. A service reads files,
an engine pixels: so the engine's speed is given twice, with the pixels at hand ("engine"), and where it must have them
from the same files first, one after the other in its own process ("engine, files").
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import httpx
import msgspec
import uvloop

from model.config import EngineConfig
from model.request import Medium, Message, SamplingParams
from service import cores
from service.media.limits import MediaLimits
from service.settings import Settings

if TYPE_CHECKING:
    from model.bench.arms import EngineArm
    from model.bench.options import Options

START_SECONDS = 300.0
ANSWER_SECONDS = 600.0
OK, LAST_CHUNK = b"HTTP/1.1 200", b"\r\n0\r\n\r\n"
THROUGH = ("engine", "engine, files", "service")
Speeds = list[tuple[float, float, float]]  # tokens per second of each repeat, through each of these


def run(options: Options, command: str) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object."""
    from model.bench import report
    from model.bench.arms import EngineArm
    from model.engine.engine import Engine

    if any(not task.startswith("image") for task in options.tasks):
        raise OSError("--service sends images: choose among the image tasks")
    names = ("model", "draft", "device", "dtype", "threads")
    # Prompts return in every repeat; in service, few are the same.
    settings = Settings(**{name: getattr(options, name) for name in names}, prefix_cache=False)
    config = EngineConfig(**settings.engine_options()[0]).resolved()
    arm = EngineArm(config.drafter, Engine(config))
    machine = report.machine(config.device, config.dtype)
    rows: list[dict[str, Any]] = []
    with _server(settings) as url:
        for task in options.tasks:
            for streams in options.batches:
                speeds, same = _compared(options, task, streams, arm, url)
                rows += _rows(options, task, streams, config.drafter, speeds, same)
    titles = ("task", "streams", "through", "tokens/s", "of engine", "of engine, files", "same tokens")
    lines: list[tuple[str, ...]] = [titles]
    for row in rows:
        cells = (row["task"], str(row["batch"]), row["through"], f"{row['tokens_per_second']:.1f}")
        shares = (_share(row, "share_of_engine"), _share(row, "share_of_engine_with_files"))
        lines.append((*cells, *shares, f"{row['same_tokens']:.0%}"))
    result = {"machine": machine, "command": command, "rows": rows}
    report.show(result, report.aligned(lines), options.output)
    return result


def _share(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_range"]
    return f"{row[name]:.1%} [{low:.1%}-{high:.1%}]"


def _compared(options: Options, task: str, streams: int, arm: EngineArm, url: str) -> tuple[Speeds, float]:
    """Turn by turn over the same prompts, new ones in each repeat (the server remembers features of media it has seen).

    Returns the speeds, and the share of requests in which both said the same.
    """
    from model.bench.workload import Workload, requests_of

    workload, params = Workload(options), options.sampling_params
    speeds: Speeds = []
    same: list[bool] = []
    count = max(options.prompts, 2 * streams)
    for repeat in range(options.repeats + 1):  # the first warms up
        samples = workload.samples(task, count, first=repeat * count)
        files = [_encoded(sample.conversation) for sample in samples]
        requests = [
            _request(url, picture, question, params, number) for number, (picture, question) in enumerate(files)
        ]
        inside = arm.run(requests_of(samples, params), in_flight=streams)
        reading = _seconds_to_read([picture for picture, _ in files], arm)
        cores.set_batch_scheduling()  # as everything around an engine does
        begun = time.perf_counter()
        received = uvloop.run(_receive_all(url, requests, streams))
        seconds = time.perf_counter() - begun
        cores.set_normal_scheduling()
        over_http = [_token_ids(answer) for answer in received]
        if repeat:
            tokens = sum(map(len, inside.answers))
            with_files = tokens / (inside.seconds + reading)
            speeds.append((inside.tokens_per_second, with_files, sum(map(len, over_http)) / seconds))
            same += [list(one) == other for one, other in zip(inside.answers, over_http, strict=True)]
    return speeds, sum(same) / len(same)


def _rows(
    options: Options, task: str, streams: int, drafter: str, speeds: Speeds, same: float
) -> Iterator[dict[str, Any]]:
    from model.bench.report import target_name

    def share(through: int, of: int) -> tuple[float, list[float]]:
        shares = [each[through] / each[of] for each in speeds]
        return round(median(shares), 4), [round(min(shares), 4), round(max(shares), 4)]

    for number, through in enumerate(THROUGH):
        of_engine, of_files = share(number, 0), share(number, 1)
        yield {
            "task": task,
            "target": target_name(options.model),
            "drafter": drafter,
            "sampling": options.sampling,
            "batch": streams,
            "through": through,
            "tokens_per_second": round(median(each[number] for each in speeds), 2),
            "acceptance_length": None,
            "speedup_over_plain": None,
            "speedup_over_generate": None,
            "share_of_engine": of_engine[0],
            "share_of_engine_range": of_engine[1],
            "share_of_engine_with_files": of_files[0],
            "share_of_engine_with_files_range": of_files[1],
            "same_tokens": round(same, 4),
            "repeats": len(speeds),
        }


# -- the client


def _encoded(messages: Sequence[Message]) -> tuple[bytes, str]:
    """The picture as PNG, which loses nothing, and the question."""
    from PIL import Image

    (message,) = messages
    medium, question = message.content
    if not isinstance(medium, Medium) or not isinstance(question, str):
        raise TypeError("a prompt here is one picture and then one question")
    file = io.BytesIO()
    Image.fromarray(medium.frames[0]).save(file, "PNG", compress_level=1)
    return file.getvalue(), question


def _seconds_to_read(pictures: Sequence[bytes], arm: EngineArm) -> float:
    """To have their pixels in this process, by the code that a decoding child runs."""
    from service.media.image import decode_image

    begun = time.perf_counter()
    for picture in pictures:
        decode_image(picture, "PNG", limits=MediaLimits(), geometry=arm.engine.info.geometry)
    return time.perf_counter() - begun


def _request(url: str, picture: bytes, question: str, params: SamplingParams, number: int) -> bytes:
    """All the bytes of one request, made before the clock starts: it is the service that is measured."""
    fields = {"prompt": question, "max_tokens": params.max_tokens, "temperature": params.temperature}
    fields |= {"seed": params.seed + number, "stream": "true"}
    files = {"media": ("picture.png", picture, "image/png")}
    request = httpx.Request("POST", f"{url}/v1/generate", data=fields, files=files)
    lines = [b"POST /v1/generate HTTP/1.1", *(name + b": " + value for name, value in request.headers.raw)]
    return b"\r\n".join([*lines, b"", request.read()])


async def _receive_all(url: str, requests: Sequence[bytes], streams: int) -> list[bytearray]:
    """Every answer as it came; `streams` clients, each with its next request as soon as the last one ended.

    What the answers say is read after the clock has stopped: the server needs the cores.
    """
    answers = [bytearray() for _ in requests]
    host, port = url.removeprefix("http://").split(":")
    waiting = deque(zip(requests, answers, strict=True))
    loop = asyncio.get_running_loop()
    clients = [_Client(waiting, loop.create_future()) for _ in range(streams)]
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            for client in clients:
                await loop.create_connection(lambda client=client: client, host, int(port))  # type: ignore[misc]
            await asyncio.gather(*(client.done for client in clients))
    finally:
        for client in clients:
            client.close()
    return answers


class _Client(asyncio.Protocol):
    """One connection, kept for one request after another. The common HTTP clients cost more than what they measure."""

    def __init__(self, waiting: deque[tuple[bytes, bytearray]], done: asyncio.Future[None]) -> None:
        self.done = done
        self._waiting = waiting
        self._answer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._answer.endswith(LAST_CHUNK):
            self._ask()
        elif len(self._answer) >= len(OK) and not self._answer.startswith(OK) and _is_whole(self._answer):
            head, _, body = self._answer.decode(errors="replace").partition("\r\n\r\n")
            self._fail(f"the server answered {head.splitlines()[0].removeprefix('HTTP/1.1 ')}: {body}")

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        self._fail("the server closed a connection in the middle of an answer")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _ask(self) -> None:
        if self._waiting and self._transport is not None:
            request, self._answer = self._waiting.popleft()
            self._transport.write(request)
        elif not self.done.done():
            self.done.set_result(None)

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(OSError(reason))


def _is_whole(reply: bytearray) -> bool:
    """Of a reply that tells its length."""
    head, end, body = reply.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


class _Token(msgspec.Struct):
    id: int


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    """What matters here of an event; `type` is "token" or "done", and of an error there is none."""

    type: str | None = None
    tokens: list[_Token] = []
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


def _token_ids(answer: bytearray) -> list[int]:
    """What one streamed answer says. Raises OSError where it broke or did not come to its end."""
    events = _unchunked(answer.partition(b"\r\n\r\n")[2]).split(b"\n\n")
    ids: list[int] = []
    done = False
    for line in filter(None, events):
        if line == b"data: [DONE]" or line.startswith(b":"):  # comments keep connections open
            continue
        event = _decode(line.removeprefix(b"data: "))
        if event.error is not None:
            raise OSError(f"a stream broke: {event.error.message}")
        ids += [token.id for token in event.tokens]
        done |= event.type == "done"
    if not done:
        raise OSError("a stream ended before it was done")
    return ids


def _unchunked(body: bytearray) -> bytes:
    pieces, at = [], 0
    while (end := body.find(b"\r\n", at)) >= 0 and (size := int(body[at:end], 16)):
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(pieces)


# -- the server


@contextmanager
def _server(settings: Settings) -> Iterator[str]:
    """A server process with these settings on a free port; its URL, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("model", "draft", "device", "dtype", "threads")
    values = {name: getattr(settings, name) for name in names}
    chosen = [f"--{name}={value}" for name, value in values.items() if value is not None]
    command = [sys.executable, "-m", "service.cli", "serve", f"--port={port}", "--log-level=warning", *chosen]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)  # noqa: S603
        try:
            url = f"http://127.0.0.1:{port}"
            _await_ready(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=url, timeout=5.0) as http:
        while True:
            try:
                if http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise OSError(f"the server did not start:\n{log.read().decode(errors='replace')[-2000:]}")
            time.sleep(0.2)
