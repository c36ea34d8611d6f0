"""`flashserve generate`: answer one prompt about local files, in this process, without HTTP."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
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
from model.request import Medium, Message, Request, RequestError, RequestOutput, RequestStats
from service.commands.decoding import answer_at_once
from service.errors import ServiceError
from service.media import Kind, MediaDecoder, MediaLimits
from service.settings import Settings, error_messages
from service.usage import speculation, timings, usage

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from service.schemas.media_options import MediaOptions

ENGINE, SAMPLING, STRUCTURED = "Model", "Sampling", "Structured output (one at most)"
VIDEO, MEDIA = "Video", "Images and videos"
# The options of structured output, as fields of `structured_outputs`.
STRUCTURED_OPTIONS = {
    "json": "--json-schema",
    "json_object": "--json-object",
    "regex": "--regex",
    "choice": "--choice",
    "grammar": "--grammar",
}


def generate(
    prompt: Annotated[str, typer.Option(help="Text of the user's message.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.", dir_okay=False)] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; repeatable.", dir_okay=False)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, usage, speculation and timings.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of the answer. Default: 256, or what fits.", rich_help_panel=SAMPLING),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: total probability kept; 1: all.", rich_help_panel=SAMPLING)
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most likely tokens kept; 0: all.", rich_help_panel=SAMPLING)] = 0,
    min_p: Annotated[
        float, typer.Option(help="Minimum probability, relative to the likeliest token's.", rich_help_panel=SAMPLING)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of all randomness.", rich_help_panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", help="Token that ends the answer; repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue past the end-of-sequence token.", rich_help_panel=SAMPLING)
    ] = False,
    min_tokens: Annotated[int, typer.Option(help="Minimum tokens of the answer.", rich_help_panel=SAMPLING)] = 0,
    presence_penalty: Annotated[float, typer.Option(help="-2 to 2; 0: none.", rich_help_panel=SAMPLING)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="-2 to 2; 0: none.", rich_help_panel=SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 0; 1: none.", rich_help_panel=SAMPLING)] = 1.0,
    speculation: Annotated[str, typer.Option(help="auto or off.", rich_help_panel=SAMPLING)] = "auto",
    json_schema: Annotated[
        str | None,
        typer.Option(
            help="The answer is JSON of this schema: a file, or JSON text.",
            metavar="FILE|JSON",
            rich_help_panel=STRUCTURED,
        ),
    ] = None,
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The answer is a JSON object.", rich_help_panel=STRUCTURED)
    ] = False,
    regex: Annotated[
        str | None, typer.Option(help="The answer matches this regular expression.", rich_help_panel=STRUCTURED)
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is one of these texts; repeatable.", rich_help_panel=STRUCTURED)
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            help="The answer follows the grammar in this file, in GBNF or Lark.",
            metavar="FILE",
            rich_help_panel=STRUCTURED,
        ),
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames sampled per video.", rich_help_panel=VIDEO)] = None,
    fps: Annotated[
        float | None, typer.Option(help="Or: frames sampled per second of video.", rich_help_panel=VIDEO)
    ] = None,
    min_pixels: Annotated[
        int | None, typer.Option(help="Enlarge smaller images and frames, where the model can.", rich_help_panel=MEDIA)
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Reduce larger images and frames, where the model can.", rich_help_panel=MEDIA)
    ] = None,
    mm_processor_kwargs: Annotated[
        str | None, typer.Option(help="Options of the model's processor, as a JSON object.", rich_help_panel=MEDIA)
    ] = None,
    model: Annotated[str, typer.Option(help="Path or id of the target model.", rich_help_panel=ENGINE)] = "demo",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", rich_help_panel=ENGINE)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.", rich_help_panel=ENGINE)
    ] = False,
    draft: Annotated[str | None, typer.Option(help="Folder of a trained draft.", rich_help_panel=ENGINE)] = None,
    drafter: Annotated[str, typer.Option(help=f"{', '.join(DRAFTERS)}.", rich_help_panel=ENGINE)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=ENGINE)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=ENGINE)] = "auto",
) -> None:
    """Answer one prompt about images and videos in this process, without HTTP.

    Prints the text as it is generated. Media come before the prompt: images first, then videos, each in their order.
    The limits are those of serve, with the same FLASH_* variables.
    """
    structured: dict[str, Any] = {"json_object": json_object, "regex": regex, "choice": choice or None}
    files: list[tuple[Path, Kind]] = [(path, "image") for path in image or ()]
    files += [(path, "video") for path in video or ()]
    values = {
        **{"prompt": prompt, "max_tokens": max_tokens, "min_tokens": min_tokens, "ignore_eos": ignore_eos},
        **{"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed},
        **{"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty},
        **{"repetition_penalty": repetition_penalty, "speculation": speculation},
        **{"num_frames": num_frames, "fps": fps, "min_pixels": min_pixels, "max_pixels": max_pixels},
        **{"mm_processor_kwargs": mm_processor_kwargs, "stop_token_ids": stop_token_ids and json.dumps(stop_token_ids)},
    }
    options = {
        "model": model,
        "revision": revision,
        "draft": draft,
        "drafter": drafter,
        "device": device,
        "dtype": dtype,
    }
    from model.engine.engine import Engine
    from service.body import Form
    from service.schemas import generate as schema
    from service.schemas.media_options import check_used
    from service.schemas.sampling import check_media_options, max_frames, sampling_params
    from service.state import media_limits

    try:
        settings = Settings(**options, **({"trust_remote_code": True} if trust_remote_code else {}))  # type: ignore[arg-type]
        # Validate like POST /v1/generate: build the form that its client would send.
        structured["json"] = schema_text(json_schema)
        structured["grammar"] = grammar and file_text(grammar, "--grammar")
        values["structured_outputs"] = json.dumps(structured)
        texts = [(name, str(value)) for name, value in values.items() if value is not None]
        texts += [("stop", text) for text in stop or ()]
        form = Form(texts, [("media", path.read_bytes()) for path, _ in files])
        fields, contents = schema.read(form, settings)
        params = sampling_params(fields, settings, default_temperature=temperature)
        hide_progress_bars()
        engine = Engine(EngineConfig(**{**settings.engine_options()[0], "max_num_seqs": 1}))
        started = time.perf_counter()
        kinds = [kind for _, kind in files]
        media_options = check_media_options(fields, settings, engine.info)
        limits = replace(media_limits(settings), max_frames=max_frames(settings, engine.info))
        media = asyncio.run(decode_all(contents, kinds, media_options, limits, engine))
        check_used(media_options, engine.info.geometry, [medium.kind for medium in media])
        media_seconds = time.perf_counter() - started
        message = Message("user", (*media, prompt) if prompt else tuple(media))
        clamp_max_tokens, speculates = fields.requested_max_tokens() is None, fields.speculation != "off"
        request = Request("generate", (message,), params, speculates, clamp_max_tokens=clamp_max_tokens)
        text, last = run(engine, request, (lambda _: None) if as_json else write)
    except (RequestError, ServiceError) as error:
        fail(with_options(error.message))
    except (ConfigError, OSError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(error_messages(error)))
    if last.finish_reason == "error":
        fail(with_options(last.error or "") or "the engine failed on this prompt")
    if as_json:
        typer.echo(json.dumps(result(text, last, media_seconds), ensure_ascii=False))
    else:
        typer.echo()


def fail(message: str) -> Any:
    """Print an error and exit with 1."""
    typer.echo(f"flashserve: {message}", err=True)
    raise typer.Exit(1)


def schema_text(value: str | None) -> str | None:
    """Return a JSON schema that is the value itself, or stands in the file of this name."""
    if value is None or value.lstrip().startswith("{"):
        return value
    return file_text(Path(value), "--json-schema")


def file_text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{option}: {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: {str(path)!r} is not text in UTF-8") from None


def with_options(message: str) -> str:
    """Name the options in an error that names the fields of a request. Names that are plain words stay as they are."""
    names = {f"structured_outputs.{field}": option for field, option in STRUCTURED_OPTIONS.items()}
    names |= {name: f"--{name.replace('_', '-')}" for name in inspect.signature(generate).parameters if "_" in name}
    names |= {"stop_token_ids": "--stop-token-id"}
    fields = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    # Errors about the processor's options go on to list them, some of which have the names of fields.
    most = 1 if message.startswith("mm_processor_kwargs") else 0
    return re.sub(rf"(?<![\w-])(?:{fields})\b", lambda found: names[found[0]], message, count=most)


def hide_progress_bars() -> None:
    """Keep transformers from printing how it loads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


async def decode_all(
    contents: list[bytes], kinds: list[Kind], options: MediaOptions, limits: MediaLimits, engine: Engine
) -> list[Medium]:
    """Decode files in a confined child, as those that come over HTTP."""
    from service.media_loader import decode_with_options

    if not contents:
        return []
    sample_frames = answer_at_once(engine.sample_frames)
    decoder = MediaDecoder(limits, engine.info.geometry, workers=1, sample_frames=sample_frames)
    await decoder.start()
    try:
        return [
            await decode_with_options(decoder, data, kind, options) for data, kind in zip(contents, kinds, strict=True)
        ]
    finally:
        await decoder.close()


def run(engine: Engine, request: Request, on_text: Callable[[str], object]) -> tuple[str, RequestOutput]:
    """Run a request; return its whole text and last output. on_text: called with each piece of text."""
    pieces: list[str] = []
    engine.add(request)
    while True:
        for output in engine.step():
            pieces.append(output.text)
            on_text(output.text)
            if output.finish_reason is not None:
                return "".join(pieces), output


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def result(text: str, last: RequestOutput, media_seconds: float) -> dict[str, Any]:
    """Format the result like POST /v1/generate."""
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
