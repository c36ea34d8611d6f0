"""`make demo`: start the service, caption the bundled image and video over HTTP, compare speculation off and on, stop.

Uses the HTTP routes alone, like any other client.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import httpx

MEDIA = {"image": ("scene.png", "Describe the image."), "video": ("clip.mp4", "Describe the video.")}
REPEATS = 5
START_SECONDS = 180
DRAFTED, PLAIN = "\033[32m", "\033[0m"


@dataclass(frozen=True)
class Measurement:
    """One answer and its times."""

    text: str
    tokens: int
    seconds: float  # of the whole request, measured by the client
    tokens_per_second: float  # while decoding
    acceptance_length: float


@contextmanager
def running_service() -> Iterator[str]:
    """Start a service on a free port and yield its base URL; stop it on exit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--log-level", "warning"]
    print("Starting:", "flashserve", *command[3:])
    process = subprocess.Popen(command, env={**os.environ, "FLASH_HOST": "127.0.0.1"})  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        print(f"Service stopped (exit code {code}).")


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Poll /readyz; exit with a message if the service ends or takes too long."""
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            sys.exit(f"demo: the service ended with code {process.returncode}; its messages are above")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                print(f"Ready after {time.monotonic() - started:.1f} s.\n")
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"demo: the service was not ready within {START_SECONDS} s")


def ask(client: httpx.Client, kind: str, *, speculation: str, show: bool = False) -> Measurement:
    """Send one streamed request to /v1/generate; with `show`, print the text as it arrives."""
    name, prompt = MEDIA[kind]
    data = resources.files("model.demo").joinpath("media", name).read_bytes()
    form = {"prompt": prompt, "speculation": speculation, "stream": "true"}
    text, done, started = "", None, time.perf_counter()
    with client.stream("POST", "/v1/generate", data=form, files={"media": (name, data)}) as response:
        if response.status_code != 200:
            sys.exit(f"demo: {response.status_code} {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                sys.exit(f"demo: {event['error']['message']}")
            if event["type"] == "done":
                done = event
                break
            text += event["text"]
            if show:
                _print_tokens(event["tokens"])
    seconds = time.perf_counter() - started
    if done is None or done["text"] != text:
        sys.exit("demo: the stream ended early, or its text differs from the final text")
    tokens, acceptance_length = done["usage"]["completion_tokens"], done["speculation"]["acceptance_length"]
    return Measurement(text, tokens, seconds, done["timings"]["tokens_per_second"], acceptance_length)


def _print_tokens(tokens: list[dict[str, Any]]) -> None:
    """Print tokens; on a terminal, those that the draft proposed in green."""
    colour = sys.stdout.isatty()
    for token in tokens:
        drafted = colour and token["source"] == "draft"
        print(f"{DRAFTED}{token['text']}{PLAIN}" if drafted else token["text"], end="", flush=True)


def compare(client: httpx.Client, kind: str) -> list[dict[str, Any]]:
    """Measure speculation off and on in turn; return two table rows. The speed-up is the median ratio of the pairs."""
    pairs = [(ask(client, kind, speculation="off"), ask(client, kind, speculation="auto")) for _ in range(REPEATS + 1)]
    pairs = pairs[1:]  # the first is a warm-up
    off, on = (([pair[i] for pair in pairs]) for i in (0, 1))
    if {a.text for a in off} != {a.text for a in on}:
        sys.exit("demo: the text differs with speculation on; this must never happen: please report it")

    def row(name: str, answers: list[Measurement], ratios: list[float]) -> dict[str, Any]:
        return {
            "": kind,
            "speculation": name,
            "tokens": answers[0].tokens,
            "tokens/s": f"{statistics.median(a.tokens_per_second for a in answers):.0f}",
            "acceptance length": f"{answers[0].acceptance_length:.2f}",
            "seconds": f"{statistics.median(a.seconds for a in answers):.2f}",
            "speed-up": f"{statistics.median(ratios):.2f}x",
            "text": "the same" if name == "on" else "",
        }

    ratios = [b.tokens_per_second / a.tokens_per_second for a, b in pairs]
    return [row("off", off, [1.0]), row("on", on, ratios)]


def print_table(rows: list[dict[str, Any]]) -> None:
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row[name]!s:>{width}}" for name, width in widths.items()))


def main() -> None:
    """Caption the bundled media with speculation off and on, and print a table."""
    with running_service() as url, httpx.Client(base_url=url, timeout=120) as client:
        for kind, (name, prompt) in MEDIA.items():
            print(f"{name}: {prompt}\n> ", end="")
            ask(client, kind, speculation="auto", show=True)
            print("\n")
        print_table([row for kind in MEDIA for row in compare(client, kind)])
        print("\ntokens/s: while decoding. seconds: the whole request, upload and first token included.")
        print(
            f"Both are medians of {REPEATS} requests. speed-up: median of the {REPEATS} ratios of tokens/s, measured in"
        )
        print("turn, which is not the ratio of the two medians.")


if __name__ == "__main__":
    main()
