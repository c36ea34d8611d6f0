"""How long a good picture waits beside clients that send slow or broken files without pause.

    python -m tests.service.starving http://127.0.0.1:8000 GOOD BAD [BAD ...]

Prints the seconds of requests with the file GOOD, alone and then beside eight clients that send the files BAD.
"""

from __future__ import annotations

import base64
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

NUM_CLIENTS = 8
NUM_GOOD = 10
SECONDS = 300.0


@dataclass
class Flood:
    """What the eight clients got so far."""

    statuses: list[int] = field(default_factory=list)


def send(http: httpx.Client, data: bytes) -> httpx.Response:
    return http.post("/v1/generate", files={"media": data}, data={"prompt": "Hi", "max_tokens": "1"})


def send_video(http: httpx.Client, data: bytes) -> httpx.Response:
    url = {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}
    content = [{"type": "video_url", "video_url": url}]
    return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 1})


@contextmanager
def flooded(
    url: str, files: Sequence[bytes], sender: Callable[[httpx.Client, bytes], httpx.Response] = send
) -> Iterator[Flood]:
    """Clients that send these files, each the next as soon as one is answered."""
    flood, over = Flood(), threading.Event()

    def run(first: int) -> None:
        with httpx.Client(base_url=url, timeout=SECONDS) as http:
            index = first
            while not over.is_set():
                flood.statuses.append(sender(http, files[index % len(files)]).status_code)
                index += 1

    clients = [threading.Thread(target=run, args=(index,)) for index in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield flood
    finally:
        over.set()
        for client in clients:
            client.join()


def timed(http: httpx.Client, data: bytes) -> float:
    begun = time.perf_counter()
    send(http, data).raise_for_status()
    return time.perf_counter() - begun


def main(url: str, good: str, *bad: str) -> None:
    data = Path(good).read_bytes()
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        send(http, data)
        report("alone", [timed(http, data) for _ in range(NUM_GOOD)])
        with flooded(url, [Path(name).read_bytes() for name in bad]) as flood:
            time.sleep(2)
            report("beside", [timed(http, data) for _ in range(NUM_GOOD)])
        counts = {status: flood.statuses.count(status) for status in sorted(set(flood.statuses))}
        sys.stdout.write(f"answers to the eight clients, by status: {counts}\n")


def report(name: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    sys.stdout.write(f"{name}: median {ordered[len(ordered) // 2]:.2f} s, longest {ordered[-1]:.2f} s\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
