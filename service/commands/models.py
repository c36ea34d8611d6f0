"""`flashserve models`: print which families of models can be served, and how."""

from __future__ import annotations

import typer


def models() -> None:
    """Print the families of vision-language models, what each can do here, and why others are refused.

    "exact": tested against transformers, token for token. A family that is not tested is served if a few passes agree
    with transformers' own when it is loaded.
    """
    from model.targets import families

    typer.echo(families.text())
