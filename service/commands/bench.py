"""`flashserve bench`: the options and the work are `model.bench`'s; only `--service` needs the service."""

from __future__ import annotations

import shlex

import typer
from pydantic import ValidationError

from service.settings import complaints


def bench(context: typer.Context) -> None:
    """Compare transformers' generate, the engine without speculation and with FLASH; or, --service, HTTP's cost."""
    from model.bench import options
    from model.errors import ConfigError

    prog = "flashserve bench"
    made = options.parser(prog)
    made.add_argument(
        "--service",
        action="store_true",
        help="instead: start the server, and compare tokens/s of streams over HTTP and of the engine in process; "
        "--batches streams at a time (default: 8), image tasks only",
    )
    given = made.parse_args(context.args)
    if given.service and given.batches == made.get_default("batches"):
        given.batches = "8"
    if given.service and given.tasks == made.get_default("tasks"):
        given.tasks = "image caption,image question"
    asked = options.read(made, given)
    command = shlex.join([*prog.split(), *context.args])
    try:
        if given.service:
            from service.commands import overhead

            overhead.run(asked, command)
        elif asked.profile:
            from model.bench.profile import profile

            profile(asked, command)
        else:
            from model.bench.run import run

            run(asked, command)
    except (ConfigError, OSError, ValidationError) as error:
        for complaint in complaints(error) if isinstance(error, ValidationError) else (error,):
            typer.echo(f"flashserve: {complaint}", err=True)
        raise typer.Exit(1) from None
