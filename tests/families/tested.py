"""Writes which families are tested, for `flashserve models`.

    python -m tests.families.tested [--docs]

Writes model/targets/tested.json, and with --docs the table in docs/models.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from model.targets import families as served
from model.targets import packed
from model.targets.families import TestedFamily
from model.targets.language import language_model
from tests.families import zoo

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def describe(names: list[str] | None = None) -> dict[str, TestedFamily]:
    """Return what the families of tiny checkpoints can do, by model_type. names: of these alone."""
    found: dict[str, TestedFamily] = {}
    for name, family in zoo.families().items():
        if names is not None and name not in names:
            continue
        config = family.build().config
        with torch.device("meta"):
            model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config)
        native = type(language_model(model)).__name__ in packed.KINDS
        images = "several" if family.several else "one"
        before = found.get(config.model_type, TestedFamily("one", False, False))  # another kind of the same family
        found[config.model_type] = TestedFamily(
            "several" if "several" in (images, before.images) else "one",
            family.video or before.video,
            native or before.native,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true")
    served.TESTED.write_text(served.write_tested(describe()))
    if parser.parse_args().docs:
        before, _, rest = DOCS.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}{served.markdown()}{END}{after}")


if __name__ == "__main__":
    main()
