"""The command line. Each command imports what it needs when it runs, so that `flashserve --help` loads no torch.

The options of `serve`, and the `FLASH_*` variables, are the fields of `Settings`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import model
from service.commands.bench import bench
from service.commands.generate import generate
from service.commands.models import models
from service.commands.plan import plan
from service.commands.train import train
from service.settings import FORMER_NAMES, Settings, error_messages

app = typer.Typer(
    name="flashserve",
    help="Serve vision-language models over HTTP, decoding with FLASH speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def with_settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every setting to a command; it gets those that are set, as text."""

    def run(**options: str | None) -> None:
        command(**{name: value for name, value in options.items() if value is not None})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, _option(name, field)])
        for name, field in Settings.model_fields.items()
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, field: FieldInfo) -> Any:
    """Declare a setting as a text option: `Settings` validates options and variables alike."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = "" if field.default in (None, ()) else f" Default: {field.default}."
    names = [name, FORMER_NAMES[name]] if name in FORMER_NAMES else [name]
    return typer.Option(
        *(f"--{each.replace('_', '-')}" for each in names),
        help=f"{field.description}{default}",
        metavar=_metavar(field),
        envvar=f"FLASH_{name.upper()}",
        show_default=False,
        hidden=bool(extra["hidden"]),
        rich_help_panel=str(extra["panel"]),
    )


def _metavar(field: FieldInfo) -> str:
    kinds = {field.annotation, *get_args(field.annotation)}
    if bool in kinds:
        return "true|false"
    return "NUMBER" if kinds & {int, float} else "TEXT"


@app.command()
@with_settings_options
def serve(**options: Any) -> None:
    """Serve a model over HTTP.

    Without options it serves the bundled model on http://127.0.0.1:8000, with a web page to try it at /.
    """
    try:
        settings = Settings(**options)
    except ValidationError as error:
        for message in error_messages(error):
            typer.echo(f"flashserve: {message}", err=True)
        raise typer.Exit(2) from None
    from service.server import run

    sys.exit(run(settings))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"flashserve {model.__version__}")


app.command()(generate)
app.command()(models)
app.command()(plan)
app.command()(train)
# The benchmark parses its own options, as `python -m model.bench` does.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


if __name__ == "__main__":
    app()
