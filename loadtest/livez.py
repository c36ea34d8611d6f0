"""Measure how quickly /livez answers while large images and videos are decoded and described.

    python -m loadtest.livez [--url http://...] [--requests 64] [--max-p99-ms 100]

A second process keeps 16 requests in progress (12-megapixel images and 1080p videos, by data URI and as files, streamed
and not); being a process of its own, it does not slow the measurement. Without --url the command starts `flashserve
serve`. The last line of standard output is one JSON object; the exit code is 1 if the 99th percentile is too high.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import sys
import time
from multiprocessing.synchronize import Event
from typing import Literal

import httpx

from loadtest import media
from loadtest.client import Question, Variant, ask
from loadtest.service import Exit, service

FRAMES = {"num_frames": 4}
PAUSE = 0.005  # seconds between two requests to /livez


def large_files() -> list[media.File]:
    return [
        media.noise(0, 2000, 1500),  # 9 MB, and 12 as a data URI
        media.image(1, 4000, 3000, "JPEG"),
        media.video(2, 1920, 1080, "mp4", num_frames=60, rate=30),
        media.image(3, 4000, 3000, "PNG"),
        media.video(4, 1920, 1080, "webm", num_frames=20, rate=10),
    ]


def load(url: str, num_requests: int, concurrency: int, begun: Event) -> None:
    """Send the large requests; runs in its own process and raises if a request fails."""
    files = large_files()

    async def crowd() -> None:
        left = iter(range(num_requests))

        async def one_client() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                for i in left:
                    route: Literal["chat", "generate"] = "chat" if i % 2 else "generate"
                    file = files[i % len(files)]
                    sampling = {"max_tokens": 48, "ignore_eos": True}
                    question = Question("Describe it.", (file,), sampling | ({} if file.kind == "image" else FRAMES))
                    answer = await ask(client, question, Variant(route, stream=i % 3 == 0))
                    if answer.status != 200 or answer.error:
                        raise RuntimeError(f"request {i}: {answer}")

        begun.set()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))

    asyncio.run(crowd())


def measure(url: str, num_requests: int, concurrency: int) -> list[float]:
    """Return the seconds that each /livez took while the large requests were in progress, sorted."""
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    crowd = spawn.Process(target=load, args=(url, num_requests, concurrency, begun))
    crowd.start()
    times = []
    with httpx.Client(base_url=url, timeout=60) as client:
        while not begun.wait(0.1):
            if not crowd.is_alive():
                sys.exit("the clients could not start")
        while crowd.is_alive():
            asked = time.perf_counter()
            client.get("/livez").raise_for_status()
            times.append(time.perf_counter() - asked)
            time.sleep(PAUSE)
    crowd.join()
    if crowd.exitcode:
        sys.exit("a request failed; see above")
    return sorted(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.livez", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--url", help="a service that runs already; without it, one is started")
    parser.add_argument("--requests", type=int, default=64, help="large requests to send (default 64)")
    parser.add_argument("--concurrency", type=int, default=16, help="large requests in progress (default 16)")
    parser.add_argument("--max-p99-ms", type=float, default=100.0, help="limit of the 99th percentile (default 100)")
    options = parser.parse_args()
    with service(options.url, Exit()) as url:
        times = measure(url, options.requests, options.concurrency)
    p50, p99, longest = (round(1e3 * times[int(q * (len(times) - 1))], 2) for q in (0.5, 0.99, 1.0))
    print(f"/livez asked {len(times)} times: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms")
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    figures = {"asked": len(times), "p50_ms": p50, "p99_ms": p99, "longest_ms": longest}
    setup = {"requests": options.requests, "concurrency": options.concurrency, "limit_ms": options.max_p99_ms}
    print(json.dumps({"machine": machine, "command": sys.argv, **setup, **figures}))
    return 0 if p99 <= options.max_p99_ms else 1


if __name__ == "__main__":
    sys.exit(main())
