"""Time one long clip of which few frames are wanted, in the confined child, beside an earlier version.

    python -m loadtest.long_video [--beside DIRECTORY_OF_ANOTHER_CHECKOUT] [--rounds 5]

The clip: 10 minutes, 1920x1080, 25 frames a second, H.264 with a keyframe every 10 s and three B-frames. Each round
starts a child of every version in turn; what counts is the processor time of the decode and the child's peak memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SECONDS, RATE, WIDTH, HEIGHT, NUM_FRAMES = 600, 25, 1920, 1080, 16
HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.long_video", description=__doc__.partition("\n")[0])
    parser.add_argument("--beside", type=Path, help="another checkout of this project, measured in turns")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each version (default 5)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the clip; what a round runs
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(asyncio.run(measure(options.measure.read_bytes()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        clip.write_bytes(long_clip())
        print(f"{SECONDS} s of {WIDTH}x{HEIGHT}, {clip.stat().st_size / 1e6:.1f} MB, {NUM_FRAMES} frames wanted")
        versions = {"this": HERE} | ({"beside": options.beside.resolve()} if options.beside else {})
        results: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
        for _ in range(options.rounds):
            for name, root in versions.items():
                results[name].append(in_checkout(root, clip))
                print(name, results[name][-1], flush=True)
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in results.items()
    }
    if "beside" in medians:
        medians["ratio"] = {key: round(medians["this"][key] / medians["beside"][key], 3) for key in medians["this"]}
    print(json.dumps(medians))


def in_checkout(root: Path, clip: Path) -> dict[str, float]:
    """This file's measurement with another checkout's decoder."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--measure", str(clip)]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


async def measure(data: bytes) -> dict[str, float]:
    """Processor seconds, seconds by the clock, and megabytes at the peak, of one decode in a child."""
    from model.request import Geometry
    from service.media import MediaDecoder, MediaLimits

    limits = MediaLimits(decode_seconds=600.0, cpu_seconds=600)
    decoder = MediaDecoder(limits, Geometry(None, 336, (336, 336), 3, 4))
    await decoder.start()
    children = [psutil.Process(pid) for pid in decoder.stats.children]
    before, clock = [processor_seconds(child) for child in children], time.perf_counter()
    await decoder.decode(data, kind="video", num_frames=NUM_FRAMES, fps=None)
    clock = time.perf_counter() - clock
    used = [processor_seconds(child) - start for child, start in zip(children, before, strict=True)]
    busy = children[used.index(max(used))]
    peak = peak_kilobytes(busy.pid)
    await decoder.close()
    return {"cpu_seconds": max(used), "seconds": clock, "peak_mb": peak / 1024}


def peak_kilobytes(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def long_clip() -> bytes:
    """One group of pictures, encoded once and repeated."""
    import av
    import numpy as np

    group = 10 * RATE
    once, file = io.BytesIO(), io.BytesIO()
    background = np.kron(
        np.random.default_rng(0).integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8),
        np.ones((40, 40, 1), dtype=np.uint8),
    )
    with av.open(once, "w", format="mp4") as container:
        encoder: Any = container.add_stream(
            "libx264", rate=RATE, options={"preset": "veryfast", "g": str(group), "bf": "3"}
        )
        encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(group):
            pixels = np.roll(background, 3 * number, axis=1)
            pixels[4 * number % 800 :][:200, 6 * number % 1600 :][:, :200] = (255, number, 0)
            container.mux(encoder.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(encoder.encode())
    once.seek(0)
    with av.open(once, "r") as source, av.open(file, "w", format="mp4") as target:
        track = source.streams.video[0]
        copy = target.add_stream_from_template(track)
        packets = [packet for packet in source.demux(track) if packet.size]
        for repeat in range(SECONDS * RATE // group):
            for packet in packets:
                again: Any = av.Packet(bytes(packet))
                shift = repeat * group * (packet.duration or 0)
                again.pts, again.dts = (packet.pts or 0) + shift, (packet.dts or 0) + shift
                again.duration, again.time_base, again.is_keyframe = (
                    packet.duration,
                    track.time_base,
                    packet.is_keyframe,
                )
                again.stream = copy
                target.mux(again)
    return file.getvalue()


if __name__ == "__main__":
    main()
