"""Do running streams keep their pace while somebody else's long video is read? `python -m model.bench.streams` tells.

A number of streams decode; the time between two deliveries of each is taken while nothing else goes on, and while a
video of many frames is encoded and prefilled beside them, from the moment it arrives to its first token. The former
before and after the latter, for streams slow down as they grow; several times, with new streams.

A checkpoint with too few positions for such a video (the bundled one has 4,096) is used with as many as it takes: what
it then says of the video is worth nothing, how long it takes to read it is what it would be.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers.utils import logging

from model.bench import report
from model.bench.options import program
from model.config import DTYPES, EngineConfig
from model.demo import prompts, scenes
from model.engine import Engine
from model.request import Medium, Message, Request, SamplingParams

SPARE = 1024  # positions beside those of the video's frames


class Streams:
    """`number` streams of an engine that all decode, and never end by themselves."""

    def __init__(self, engine: Engine, number: int, *, max_tokens: int) -> None:
        self.engine = engine
        self._heard: dict[str, float] = {}
        for index in range(number):
            conversation = prompts.messages(index, split="heldout", task="image caption")
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            engine.add(Request(f"stream {index}", conversation, params))
        while len(self._heard) < number:
            self.gaps(steps=1)

    def gaps(self, *, steps: int | None = None, until: str | None = None) -> list[float]:
        """Seconds between deliveries to each stream, over so many steps, or until something is delivered to `until`."""
        gaps = []
        for _ in count() if steps is None else range(steps):
            names = [output.request_id for output in self.engine.step()]
            now = time.perf_counter()
            for name in names:
                if name in self._heard:
                    gaps.append(now - self._heard[name])
                if name.startswith("stream"):
                    self._heard[name] = now
            if until in names:
                break
        return gaps

    def end(self) -> None:
        for name in self._heard:
            self.engine.abort(name)


def measure(
    engine: Engine, *, streams: int, frames: int, steps: int, repeats: int, done: Callable[[], object]
) -> dict[str, Any]:
    """Figures of one engine."""
    alone, beside, reading = list[float](), list[float](), list[float]()
    room = engine.max_model_len - engine.info.tokens_per_image - SPARE
    for repeat in range(repeats):
        crowd = Streams(engine, streams, max_tokens=room)
        alone += crowd.gaps(steps=steps)
        scene = scenes.random_video_scene(scenes.scene_seed("heldout", "video", 900_000 + repeat))
        video = Medium("video", scenes.render_clip(scene, frames, prompts.SIDE))
        begun = time.perf_counter()
        engine.add(Request("video", (Message("user", (video, "What happens?")),), SamplingParams(max_tokens=1)))
        beside += crowd.gaps(until="video")
        reading.append(time.perf_counter() - begun)
        alone += crowd.gaps(steps=steps)
        crowd.end()
        done()
    before, during = (np.percentile(gaps, (50, 95, 100)) for gaps in (alone, beside))
    return {
        "drafter": engine.config.drafter,
        "streams": streams,
        "frames": frames,
        "seconds_to_read": round(float(np.median(reading)), 3),
        "alone_p50_p95_max_ms": [round(1e3 * float(x), 2) for x in before],
        "beside_p50_p95_max_ms": [round(1e3 * float(x), 2) for x in during],
        "p95_ratio": round(float(during[1] / before[1]), 2),
    }


@contextmanager
def long_enough(config: EngineConfig, positions: int) -> Iterator[EngineConfig]:
    """The same checkpoint with at least so many positions."""
    described = Path(config.model) / "config.json"
    text = json.loads(described.read_text()) if described.exists() else {}
    if text.get("text_config", {}).get("max_position_embeddings", positions) >= positions:
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(config.model).iterdir():
            (Path(folder) / file.name).symlink_to(file.resolve())
        text["text_config"]["max_position_embeddings"] = positions
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(text))
        yield replace(config, model=folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.bench.streams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--drafters", default="off,flash", help="default: off,flash")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="before each video, and after (default: 100)")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args(argv)
    logging.disable_progress_bar()
    config = EngineConfig(
        model=asked.model, draft=asked.draft, device=asked.device, dtype=asked.dtype, max_num_seqs=asked.streams + 1
    ).resolved()
    drafters = asked.drafters.split(",")
    rows = []
    tokens = Engine(replace(config, drafter="off", max_num_seqs=1)).info.tokens_per_image
    positions = tokens * asked.frames + SPARE
    with tqdm(total=len(drafters) * asked.repeats, unit="video", disable=None) as bar:
        for drafter in drafters:
            with long_enough(replace(config, drafter=drafter, max_model_len=positions), positions) as long:
                engine = Engine(long)
            sizes = {name: getattr(asked, name) for name in ("streams", "frames", "steps", "repeats")}
            rows.append(measure(engine, **sizes, done=bar.update))
    machine = report.machine(config.device, config.dtype)
    lines: list[tuple[str, ...]] = [
        ("drafter", "streams", "frames", "read in", "alone p50/p95/max ms", "beside p50/p95/max ms", "p95 ratio")
    ]
    for row in rows:
        before, during = (" ".join(map(str, row[name])) for name in ("alone_p50_p95_max_ms", "beside_p50_p95_max_ms"))
        size = (str(row["streams"]), str(row["frames"]), f"{row['seconds_to_read']} s")
        lines.append((row["drafter"], *size, before, during, f"{row['p95_ratio']}x"))
    print(f"\n{report.aligned(lines)}\n")
    print(json.dumps({
        "machine": machine,
        "command": shlex.join(["python", "-m", "model.bench.streams", *argv]),
        "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    program(main)
