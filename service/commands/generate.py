"""`flashserve generate`: one answer about files of one's own, in this process."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from model.config import DRAFTERS, EngineConfig
from model.errors import ConfigError
from model.request import Geometry, Medium, Message, Request, RequestError, RequestOutput, RequestStats
from service.errors import ServiceError
from service.media import Kind, MediaDecoder, MediaLimits
from service.settings import Settings, complaints
from service.usage import speculation, timings, usage

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from service.schemas.sampling import SamplingFields

ENGINE, SAMPLING, VIDEO = "Model", "Sampling", "Video"


def generate(
    prompt: Annotated[str, typer.Option(help="What to say or ask about the media.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.", dir_okay=False)] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; repeatable.", dir_okay=False)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, usage, speculation and timings.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, tokens; by default 256, or what fits.", rich_help_panel=SAMPLING)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.", rich_help_panel=SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 0.0,
    seed: Annotated[int, typer.Option(help="Fixes all randomness.", rich_help_panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would end.", rich_help_panel=SAMPLING)
    ] = False,
    min_tokens: Annotated[int, typer.Option(help="Shortest answer, tokens.", rich_help_panel=SAMPLING)] = 0,
    presence_penalty: Annotated[float, typer.Option(help="-2 to 2.", rich_help_panel=SAMPLING)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="-2 to 2.", rich_help_panel=SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: none.", rich_help_panel=SAMPLING)] = 1.0,
    speculation: Annotated[str, typer.Option(help="auto, off.", rich_help_panel=SAMPLING)] = "auto",
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
    What may be asked for, FLASH_* variables say, as of serve.
    """
    files: list[tuple[Path, Kind]] = [(path, "image") for path in image or ()]
    files += [(path, "video") for path in video or ()]
    asked = {
        **{"prompt": prompt, "max_tokens": max_tokens, "min_tokens": min_tokens, "ignore_eos": ignore_eos},
        **{"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed},
        **{"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty},
        **{"repetition_penalty": repetition_penalty, "speculation": speculation},
        **{"num_frames": num_frames, "fps": fps},
    }
    options = {"model": model, "draft": draft, "drafter": drafter, "device": device, "dtype": dtype}
    from model.engine.engine import Engine
    from service.body import Form
    from service.prompt import check_sampling_used
    from service.schemas import generate as schema
    from service.schemas.sampling import check_num_frames, max_frames, sampling_params
    from service.state import media_limits

    try:
        settings = Settings(**options)  # type: ignore[arg-type]
        # The form that a client of POST /v1/generate would send: what it may say and means is said there.
        fields = [(name, str(value)) for name, value in asked.items() if value is not None]
        fields += [("stop", text) for text in stop or ()]
        form = Form(fields, [("media", path.read_bytes()) for path, _ in files])
        ask, contents = schema.read(form, settings)
        params = sampling_params(ask, settings, default_temperature=temperature)
        quiet_loading()
        engine = Engine(EngineConfig(**{**settings.engine_options()[0], "max_num_seqs": 1}))
        begun = time.perf_counter()
        kinds = [kind for _, kind in files]
        check_num_frames(ask, settings, engine.info)
        limits = replace(media_limits(settings), max_frames=max_frames(settings, engine.info))
        media = asyncio.run(decoded(contents, kinds, ask, limits, engine.info.geometry))
        check_sampling_used(ask, media)
        media_seconds = time.perf_counter() - begun
        message = Message("user", (*media, prompt) if prompt else tuple(media))
        fit, speculates = ask.asked_max_tokens() is None, ask.speculation != "off"
        request = Request("generate", (message,), params, speculates, fit=fit)
        text, last = answer(engine, request, (lambda _: None) if as_json else show)
    except (ConfigError, RequestError, ServiceError, OSError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(complaints(error)))
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


async def decoded(
    contents: list[bytes], kinds: list[Kind], ask: SamplingFields, limits: MediaLimits, geometry: Geometry
) -> list[Medium]:
    """The same decoding, in the same confined child, as files get that come over HTTP."""
    if not contents:
        return []
    decoder = MediaDecoder(limits, geometry, workers=1)
    await decoder.start()
    try:
        return [
            await decoder.decode(data, kind=kind, num_frames=ask.num_frames, fps=ask.fps)
            for data, kind in zip(contents, kinds, strict=True)
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
        "usage": usage([stats]),
        "speculation": speculation(stats),
        "timings": timings(
            queue=stats.queue,
            media=media_seconds,
            time_to_first_token=media_seconds + stats.time_to_first_token,
            decode=stats.decode,
            seconds_per_token=stats.decode / later if later > 0 else None,
        ),
    }
