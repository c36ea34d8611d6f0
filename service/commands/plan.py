"""`flashserve plan`: print what a model takes of memory, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from model.config import EngineConfig
from model.errors import ConfigError
from service.commands.generate import fail
from service.settings import Settings, error_messages


def plan(
    model: Annotated[str, typer.Option(help="Path or id of the target model; its weights need not be there.")] = "demo",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    draft: Annotated[str | None, typer.Option(help="Folder of a trained draft.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_num_seqs: Annotated[int | None, typer.Option(help="Maximum sequences that are decoded in one batch.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Maximum tokens of prompt and answer together.")] = None,
    memory_utilization: Annotated[float | None, typer.Option(help="Share of the free memory that may be used.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="Plan for so many GiB of free memory. Default: what is free now.")
    ] = None,
) -> None:
    """Print what a model takes of memory, and how many sequences of what length fit beside it.

    Reads the checkpoint's config and the headers of its files, not its weights. Ends with 1 if the model does not fit.
    """
    options = {
        **{"model": model, "revision": revision, "draft": draft, "device": device, "dtype": dtype},
        **{"max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "memory_utilization": memory_utilization},
    }
    from dataclasses import replace

    from model.engine.sizing import Needs, Sizing
    from model.targets.registry import open_checkpoint

    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
        config = EngineConfig(**settings.engine_options()[0]).resolved()
        sizing = Sizing.read(config, None)
        if memory is not None:
            free = int(memory * (1 << 30))
            sizing = replace(sizing, free=free, budget=int(free * config.memory_utilization))
        planned = sizing.plan(Needs.of_checkpoint(config, open_checkpoint(config)))
        typer.echo(f"{settings.model_name} on {config.device} in {config.dtype}, MiB:\n")
        typer.echo(planned.table(lengths=True))
        planned.check()
    except ConfigError as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(error_messages(error)))
