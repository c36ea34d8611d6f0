"""What HTTP and streaming cost: the same prompts answered by a real server over HTTP, and by the engine in process.

Both keep the same number of requests going until all are answered, with the same engine options. The client that
reads the streams shares the machine with the server; what it costs counts against the service.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx

from model.config import EngineConfig
from model.request import Medium, Message, SamplingParams
from service.settings import Settings

if TYPE_CHECKING:
    from model.bench.arms import EngineArm
    from model.bench.options import Options

START_SECONDS = 300.0
Speeds = list[tuple[float, float]]  # tokens per second (in process, over HTTP) of each repeat


def run(options: Options, command: str) -> dict[str, Any]:
    """Measure; print the table and, last, the JSON object."""
    from model.bench import report, run
    from model.bench.arms import EngineArm
    from model.engine import Engine

    if any(not task.startswith("image") for task in options.tasks):
        raise OSError("--service sends images: choose among the image tasks")
    names = ("model", "draft", "device", "dtype", "threads")
    settings = Settings(**{name: getattr(options, name) for name in names})
    config = EngineConfig(**settings.engine_options()[0]).resolved()
    arm = EngineArm(config.drafter, Engine(config))
    machine = report.machine(config.device, config.dtype)
    rows: list[dict[str, Any]] = []
    with _server(settings) as url:
        for task in options.tasks:
            for streams in options.batches:
                speeds, same = _compared(options, task, streams, arm, url)
                rows += _rows(options, task, streams, config.drafter, speeds, same)
    lines: list[tuple[str, ...]] = [("task", "streams", "through", "tokens/s", "of engine", "same tokens")]
    for row in rows:
        low, high = row["share_of_engine_range"]
        share = f"{row['share_of_engine']:.1%} [{low:.1%}-{high:.1%}]"
        cells = (row["task"], str(row["batch"]), row["through"], f"{row['tokens_per_second']:.1f}", share)
        lines.append((*cells, f"{row['same_tokens']:.0%}"))
    result = {"machine": machine, "command": command, "rows": rows}
    run.show(result, report.aligned(lines), options)
    return result


def _compared(options: Options, task: str, streams: int, arm: EngineArm, url: str) -> tuple[Speeds, float]:
    """Turn by turn over the same prompts, new ones in each repeat (the server remembers features of media it has seen).

    Returns the speeds, and the share of requests in which both said the same.
    """
    from model.bench import workload

    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=0.0 if options.sampling == "greedy" else 1.0, seed=1
    )
    speeds: Speeds = []
    same: list[bool] = []
    count = max(options.prompts, 2 * streams)
    for repeat in range(options.repeats + 1):  # the first warms up
        prompts = workload.conversations(options, task, first=repeat * count, count=count)
        sent = [_encoded(messages) for messages in prompts]
        inside = arm.run(prompts, params, in_flight=streams)
        begun = time.perf_counter()
        over_http = asyncio.run(_stream_all(url, sent, params, streams))
        seconds = time.perf_counter() - begun
        if repeat:
            speeds.append((inside.tokens_per_second, sum(map(len, over_http)) / seconds))
            same += [list(one) == other for one, other in zip(inside.answers, over_http, strict=True)]
    return speeds, sum(same) / len(same)


def _rows(
    options: Options, task: str, streams: int, drafter: str, speeds: Speeds, same: float
) -> Iterator[dict[str, Any]]:
    from model.bench.report import target_name

    for through, number in (("engine", 0), ("service", 1)):
        shares = [pair[number] / pair[0] for pair in speeds]
        yield {
            "task": task,
            "target": target_name(options.model),
            "drafter": drafter,
            "sampling": options.sampling,
            "batch": streams,
            "through": through,
            "tokens_per_second": round(median(pair[number] for pair in speeds), 2),
            "acceptance_length": None,
            "speedup_over_plain": None,
            "speedup_over_generate": None,
            "share_of_engine": round(median(shares), 4),
            "share_of_engine_range": [round(min(shares), 4), round(max(shares), 4)],
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


async def _stream_all(url: str, sent: list[tuple[bytes, str]], params: SamplingParams, streams: int) -> list[list[int]]:
    """Token ids of every answer; `streams` clients, each with its next request as soon as the last one ended."""
    answers: list[list[int]] = [[] for _ in sent]
    waiting = deque(range(len(sent)))

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            number = waiting.popleft()
            picture, question = sent[number]
            fields = {"prompt": question, "max_tokens": params.max_tokens, "temperature": params.temperature}
            fields |= {"seed": params.seed + number, "stream": "true"}
            files = {"media": ("picture.png", picture, "image/png")}
            async with http.stream("POST", "/v1/generate", data=fields, files=files) as response:
                if response.status_code != 200:
                    raise OSError(f"the server answered {response.status_code}: {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    answers[number] += _token_ids(line)

    async with httpx.AsyncClient(base_url=url, timeout=600.0) as http, asyncio.TaskGroup() as clients:
        for _ in range(streams):
            clients.create_task(client(http))
    return answers


def _token_ids(line: str) -> list[int]:
    if not line.startswith("data: {"):
        return []
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise OSError(f"a stream broke: {event['error']['message']}")
    return [token["id"] for token in event.get("tokens", ())]


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
