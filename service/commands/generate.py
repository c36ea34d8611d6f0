"""`flashserve generate`: one answer about files of one's own, in this process."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from model.config import DRAFTERS, ConfigError, EngineConfig
from model.request import Geometry, Medium, Message, Request, RequestError, RequestOutput, RequestStats, SamplingParams
from service.errors import ServiceError
from service.media import Kind, MediaDecoder, MediaLimits
from service.settings import Settings

if TYPE_CHECKING:
    from model.engine import Engine

ENGINE, SAMPLING, VIDEO = "Model", "Sampling", "Video"


def generate(
    prompt: Annotated[str, typer.Option(help="What to say or ask about the media.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.", dir_okay=False)] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; repeatable.", dir_okay=False)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, usage, speculation and timings.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", rich_help_panel=SAMPLING)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.", rich_help_panel=SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 0.0,
    seed: Annotated[int, typer.Option(help="Fixes all randomness.", rich_help_panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames taken of a video.", rich_help_panel=VIDEO)] = None,
    fps: Annotated[float | None, typer.Option(help="Or: frames taken a second.", rich_help_panel=VIDEO)] = None,
    model: Annotated[str, typer.Option(help="Path or id of the target.", rich_help_panel=ENGINE)] = "demo",
    draft: Annotated[str | None, typer.Option(help="Path of a trained draft.", rich_help_panel=ENGINE)] = None,
    drafter: Annotated[str, typer.Option(help=f"{', '.join(DRAFTERS)}.", rich_help_panel=ENGINE)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=ENGINE)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=ENGINE)] = "auto",
) -> None:
    """Answer one prompt about images and videos, here, without HTTP.

    The text is printed as it arrives. Media come before the prompt: images first, then videos, each in the order given.
    """
    files: list[tuple[Path, Kind]] = [(path, "image") for path in image or ()]
    files += [(path, "video") for path in video or ()]
    try:
        params = SamplingParams(max_tokens, temperature, top_p, top_k, min_p, seed=seed, stop=tuple(stop or ()))
        options = {"model": model, "draft": draft, "drafter": drafter, "device": device, "dtype": dtype}
        settings = Settings(**options)  # type: ignore[arg-type]
        from model.engine import Engine

        quiet_loading()
        engine = Engine(EngineConfig(**{**settings.engine_options()[0], "max_num_seqs": 1}))
        begun = time.perf_counter()
        media = asyncio.run(read_media(files, engine.info.geometry, num_frames, fps)) if files else []
        media_seconds = time.perf_counter() - begun
        request = Request("generate", (Message("user", (*media, prompt)),), params)
        text, last = answer(engine, request, (lambda _: None) if as_json else show)
    except (ConfigError, RequestError, ServiceError, OSError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()))
    if last.finish_reason == "error":
        fail(last.error or "the engine could not answer")
    if as_json:
        typer.echo(json.dumps(result(text, last, media_seconds), ensure_ascii=False))
    else:
        typer.echo()


def fail(message: str) -> Any:
    typer.echo(f"flashserve: {message}", err=True)
    raise typer.Exit(1)


def quiet_loading() -> None:
    """What is printed is the answer, not how its weights were read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


async def read_media(
    files: list[tuple[Path, Kind]], geometry: Geometry, num_frames: int | None, fps: float | None
) -> list[Medium]:
    """The same decoding, in the same confined child, as a file gets that comes over HTTP."""
    decoder = MediaDecoder(MediaLimits(), geometry, workers=1)
    await decoder.start()
    try:
        return [
            await decoder.decode(await asyncio.to_thread(path.read_bytes), kind=kind, num_frames=num_frames, fps=fps)
            for path, kind in files
        ]
    finally:
        await decoder.close()


def answer(engine: Engine, request: Request, tell: Callable[[str], object]) -> tuple[str, RequestOutput]:
    """The whole text, and the last output; `tell` gets every piece of text as it comes."""
    pieces: list[str] = []
    engine.add(request)
    while True:
        for output in engine.step():
            pieces.append(output.text)
            tell(output.text)
            if output.finish_reason is not None:
                return "".join(pieces), output


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def result(text: str, last: RequestOutput, media_seconds: float) -> dict[str, Any]:
    """In the words of POST /v1/generate."""
    stats = last.stats or RequestStats(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    later = stats.completion_tokens - 1
    return {
        "text": text,
        "finish_reason": last.finish_reason,
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            "completion_tokens_details": {
                "accepted_prediction_tokens": stats.accepted_tokens,
                "rejected_prediction_tokens": stats.draft_tokens - stats.accepted_tokens,
            },
        },
        "speculation": {
            "acceptance_length": 1.0 + stats.accepted_tokens / stats.drafts if stats.drafts else 1.0,
            **{name: asdict(stats)[name] for name in ("drafts", "draft_tokens", "accepted_tokens")},
        },
        "timings": {
            "queue": stats.queue,
            "media": media_seconds,
            "time_to_first_token": media_seconds + stats.time_to_first_token,
            "decode": stats.decode,
            "tokens_per_second": later / stats.decode if later > 0 and stats.decode > 0 else 0.0,
        },
    }
