"""Write the model card of a trained draft: README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = """\
---
library_name: flashserve
tags: [speculative-decoding, vision-language, draft, {drafter}]
---

# A `{drafter}` draft for {model}

It proposes tokens for that one target, which verifies them: answers stay what they are without it, and come sooner.

```
flashserve serve --model {model} --draft {folder}
```

## What it was trained on

| | |
|---|---|
| target | `{model}`, fingerprint `{target_fingerprint}` |
| data | {data} |
| answers | written by the target itself, at temperatures {temperatures}, at most {max_tokens} tokens: {examples} used |
| training | {steps} steps of {batch} answers, {anchors} drafts begun in each; rate {rate}, seed {seed} |
| draft | {parameters:,} parameters; {shape} |
| versions | flashserve {flashserve_version}, torch {torch_version}, transformers {transformers_version} |

```
{command}
```

## How long it is accepted for

Mean tokens that a verify step emits, greedy, on prompts held out from training. No figure of speed: that depends on the
machine and the load, and `flashserve bench --draft` measures it. Drafts were tried here whether they pay or not.

| prompts about | acceptance length | prompts | drafts |
|---|---|---|---|
{rows}

Share of drafts of which position 1, 2, ... was accepted: {positions}. The chances that it gives its nodes are off by
{miscalibration:.3f} on average; serving corrects them by what it sees.
{pictures}{left_out}"""


def write(
    folder: Path,
    notes: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[str],
    left_out: Sequence[str],
) -> None:
    """Write README.md and list the pictures and the prompts that could not be used.

    notes: the values that TEMPLATE names, except rows, positions, pictures and left_out, which this function fills in.
    figures: kind of prompt -> `Acceptance.as_json`; the kind "all" is required. pictures: file names in `folder`.
    left_out: one reason for each prompt that was not used.
    """
    rows = "\n".join(
        f"| {kind} | {each['length']:.2f} | {each['prompts']} | {each['drafts']} |" for kind, each in figures.items()
    )
    positions = ", ".join(f"{share:.2f}" for share in figures["all"]["positions"])
    filled = TEMPLATE.format(
        **notes,
        rows=rows,
        positions=positions or "none ever",
        pictures="".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in pictures),
        left_out=f"\n## Left out\n\n{_listed(left_out)}\n" if left_out else "",
    )
    (folder / "README.md").write_text(filled)


def _listed(reasons: Sequence[str], most: int = 20) -> str:
    """Format reasons as a Markdown list of at most `most` lines, and count the rest in a last line."""
    lines = [f"- {reason}" for reason in reasons[:most]]
    return "\n".join(lines + [f"- and {len(reasons) - most} more"] * (len(reasons) > most))
