"""`flashserve bench`: options and work are `model.bench`'s; here the service decodes a user's own files."""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import typer
from pydantic import ValidationError

from service.settings import error_messages

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from model.train.manifest import Decode

PROG = "flashserve bench"


def bench(context: typer.Context) -> None:
    """Compare transformers' generate, the engine without speculation and with FLASH, on scenes or on your own files."""
    from model.errors import ConfigError

    try:
        _bench(context.args)
    except (ConfigError, OSError, ValidationError) as error:
        for message in error_messages(error) if isinstance(error, ValidationError) else (error,):
            typer.echo(f"flashserve: {message}", err=True)
        raise typer.Exit(1) from None


def _bench(argv: list[str]) -> None:
    from model.bench import options

    if "--equality" in argv:
        from model.bench import equality

        others = [word for word in argv if word != "--equality"]
        raise typer.Exit(equality.main(others, f"{PROG} --equality", decoding_for))
    parser = options.build_parser(PROG)
    parser.add_argument(
        "--equality",
        action="store_true",
        help="instead: check that every way of decoding gives the same tokens; has options of its own: add --help",
    )
    chosen = options.read_options(parser, parser.parse_args(argv))
    from service.commands.forms import api_forms  # it loads torch, which --help does not need

    chosen = replace(chosen, forms=api_forms())
    command = shlex.join([*PROG.split(), *argv])
    if chosen.profile:
        from model.bench.profile import profile

        profile(chosen, command, decoding_for)
    else:
        from model.bench.run import run

        run(chosen, command, decoding_for)


def decoding_for(engine: Engine) -> AbstractContextManager[Decode]:
    """Decoding as the service would do it for this engine: at its size, with the frames that it chooses and has
    room for."""
    from service.commands.decoding import decode_files
    from service.media import MediaLimits

    limits = MediaLimits()
    limits = replace(limits, max_frames=min(limits.max_frames, engine.info.max_frames))
    return decode_files(limits, engine.info.geometry, sample=engine.sample_frames)
