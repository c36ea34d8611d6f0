"""Says which families of vision-language models can be served, and how: for `flashserve models` and docs/models.md.

tested.json has the families whose tiny checkpoints are compared with transformers, token for token, in the test suite;
`python -m tests.families.tested` writes it. Other families that transformers knows are served if they prove themselves
when they are loaded (load_check.py), or are refused with a reason.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from model.targets.checkpoint import REFUSED

TESTED = Path(__file__).parent / "tested.json"


@dataclass(frozen=True)
class TestedFamily:
    """What a tested family can do. images: "one" or "several" in a prompt; video: whether it takes videos; native:
    whether its decoder runs in the native library on CPUs."""

    images: str
    video: bool
    native: bool


@dataclass(frozen=True)
class FamilyStatus:
    """A family's row in the table. kind: its model_type; exact: whether it is tested against transformers; reason: why
    it is refused, None if it is not."""

    kind: str
    tested: TestedFamily | None
    reason: str | None

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Return the row's cells as text."""
        if self.reason is not None:
            return (self.kind, "refused", "", "", self.reason)
        if self.tested is None:
            return (self.kind, "if it proves itself when loaded", "", "", "")
        decoder = "native" if self.tested.native else "torch"
        media = "one image" if self.tested.images == "one" else "several images"
        return (self.kind, "exact", media, "video" if self.tested.video else "", decoder)


def tested() -> dict[str, TestedFamily]:
    """Read tested.json: families by model_type."""
    return {kind: TestedFamily(**each) for kind, each in json.loads(TESTED.read_text()).items()}


def write_tested(families: dict[str, TestedFamily]) -> str:
    """Return tested.json's text."""
    return json.dumps({kind: asdict(each) for kind, each in sorted(families.items())}, indent=2) + "\n"


def statuses() -> list[FamilyStatus]:
    """Return a row for each family: the tested ones, those that may prove themselves, the refused ones."""
    known = tested()
    rows = [FamilyStatus(kind, each, None) for kind, each in sorted(known.items())]
    others = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *REFUSED} - known.keys())
    refused = [FamilyStatus(kind, None, _refusal(kind)) for kind in others]
    return [*rows, *(row for row in refused if row.reason is None), *(row for row in refused if row.reason)]


def _refusal(kind: str) -> str | None:
    """Return why a family that is not tested is refused whatever its checkpoint; None if it is not."""
    if kind in REFUSED:
        return REFUSED[kind]
    config = CONFIG_MAPPING[kind]
    try:
        encoder_decoder = config().is_encoder_decoder
    except Exception:  # some need arguments
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    return "it is an encoder-decoder, which is not supported" if encoder_decoder else None


def markdown() -> str:
    """Write the table for docs/models.md."""
    lines = ["| `model_type` | answers | images | videos | decoder on CPUs |", "|---|---|---|---|---|"]
    rows = statuses()
    for row in rows:
        if row.tested is not None:
            kind, *cells = row.cells
            lines.append(f"| `{kind}` | {' | '.join(cells)} |".replace("|  |", "| |"))
    unproven = ", ".join(f"`{row.kind}`" for row in rows if row.tested is None and row.reason is None)
    lines += ["", f"Served if they prove themselves when they are loaded: {unproven}.", "", "Refused:", ""]
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.reason is not None:
            by_reason.setdefault(row.reason, []).append(f"`{row.kind}`")
    lines += [f"- {', '.join(kinds)}: {reason}." for reason, kinds in by_reason.items()]
    return "\n".join(lines) + "\n"


def text() -> str:
    """Write the table for a terminal."""
    rows = [("model_type", "answers", "images", "videos", "decoder on CPUs"), *(row.cells for row in statuses())]
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )
