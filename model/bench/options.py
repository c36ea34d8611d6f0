"""What the benchmark can be asked, and its help. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

from model.config import DRAFTERS, DTYPES, DrafterName, EngineConfig, drafter_of
from model.errors import ConfigError
from model.request import SamplingParams

ARMS = ("generate", "off", *(name for name in DRAFTERS if name not in ("auto", "off")))
REPLAY = "replay:"
T = TypeVar("T")
DESCRIPTION = """\
Compares, on the same prompts in one run: transformers' own generate (batched, left-padded), the engine without
speculation (off) and the engine with FLASH (flash); or with other drafters: flash-paper, eagle, medusa (each needs its
own --draft), ngram. replay:0.8 is a simulation: a draft that costs nothing and is right with probability 0.8 a token.

A round submits BATCH prompts at once and ends with the last token of the last of them; a repeat is as many rounds as
it takes for every prompt to have been answered once. tokens/s = tokens emitted (EOS included, padding not) / seconds of
the rounds, with tokenising, image processing, vision and prefill: whole requests. decode tokens/s = tokens after the
first of each answer / seconds without vision and prefill. The arms take turns within a repeat, and each speed-up is
the median, over repeats, of the ratio taken within one repeat; [min-max] is its spread. Features of media are not kept
between requests, so that no arm is spared the vision tower.
"""


@dataclass(frozen=True)
class Options:
    model: str
    drafts: tuple[str, ...]
    device: str
    dtype: str
    threads: int | None
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    batches: tuple[int, ...]
    repeats: int
    prompts: int
    max_tokens: int
    sampling: Literal["greedy", "seeded"]
    images: tuple[Path, ...]
    prompt: str | None
    output: Path | None
    profile: bool

    @property
    def draft(self) -> str | None:
        """Of one drafter, where only one is looked at."""
        return self.drafts[0] if self.drafts else None

    @property
    def engine_config(self) -> EngineConfig:
        """Nothing is kept of media: prompts return in every repeat, and no arm is to be spared the vision tower."""
        return EngineConfig(
            model=self.model,
            draft=self.draft,
            device=self.device,
            dtype=self.dtype,
            max_num_seqs=max(self.batches),
            encoder_cache_bytes=0,
            prefix_cache=False,
        )

    def config_of(self, drafter: str) -> EngineConfig:
        """The engine with this drafter, and with the draft among those given that is its own."""
        draft = next((draft for draft in self.drafts if drafter_of(Path(draft)) == drafter), None)
        return replace(self.engine_config, draft=draft, drafter=cast("DrafterName", drafter))

    @property
    def sampling_params(self) -> SamplingParams:
        temperature = 0.0 if self.sampling == "greedy" else 1.0
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=1)


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--model", default="demo", help="path or id of the target; demo is the bundled one (default)")
    made.add_argument("--draft", action="append", default=[], help="path of a draft; repeatable, one for each drafter")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    made.add_argument("--dtype", default="auto", choices=DTYPES, help="of all three alike (default: auto)")
    made.add_argument("--threads", type=_positive, help="CPU threads (default: as torch chooses)")
    made.add_argument("--drafters", default="generate,off,flash", help="which to compare (default: generate,off,flash)")
    made.add_argument(
        "--tasks",
        default="image caption,image question,video caption",
        help="of the demo: image caption, image question, video caption, video question (default: the first three)",
    )
    made.add_argument("--batches", default="1,4,8,16", help="how many requests at once (default: 1,4,8,16)")
    made.add_argument("--repeats", type=_positive, help="default: 5")
    made.add_argument("--prompts", type=_positive, help="prompts per task (default: 16)")
    made.add_argument("--max-tokens", type=_positive, help="longest answer (default: 160)")
    made.add_argument(
        "--sampling",
        default="greedy",
        choices=("greedy", "seeded"),
        help="seeded: temperature 1; generate then draws its own answers, the other two the same as each other",
    )
    made.add_argument("--image", type=Path, action="append", default=[], help="measure on this file; repeatable")
    made.add_argument("--prompt", help="what to ask about each --image")
    made.add_argument("--output", type=Path, help="write the JSON object to this file too")
    made.add_argument(
        "--profile",
        action="store_true",
        help="instead: where a step's time goes, of off and flash, against what the machine's memory bandwidth and "
        "matrix rate allow",
    )
    made.add_argument("--quick", action="store_true", help="a first impression: 4 prompts, 2 repeats, batches 1 and 4")
    return made


def read(made: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    """The options that were given, checked; exits with the parser's message where they cannot be used."""
    arms = _split(given.drafters)
    if not arms or not all(arm in ARMS or _is_replay(arm) for arm in arms):
        made.error(f"--drafters must be some of {', '.join(ARMS)}, {REPLAY}ACCURACY")
    tasks = tuple(task.replace("-", " ") for task in _split(given.tasks))
    if set(tasks) - {f"{kind} {what}" for kind in ("image", "video") for what in ("caption", "question")}:
        made.error("--tasks must be some of image caption, image question, video caption, video question")
    if bool(given.image) != bool(given.prompt):
        made.error("--image and --prompt belong together")
    batches = "1,4" if given.quick and given.batches == made.get_default("batches") else given.batches
    try:
        sizes = tuple(_positive(batch) for batch in _split(batches))
    except (ValueError, argparse.ArgumentTypeError):
        made.error("--batches must be numbers, such as 1,4,8,16")
    return Options(
        model=given.model,
        drafts=tuple(given.draft),
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        arms=(*(arm for arm in ARMS if arm in arms), *dict.fromkeys(arm for arm in arms if arm not in ARMS)),
        tasks=("own image",) if given.image else tasks,
        batches=sizes,
        repeats=given.repeats or (2 if given.quick else 5),
        prompts=given.prompts or (4 if given.quick else 16),
        max_tokens=given.max_tokens or 160,
        sampling=given.sampling,
        images=tuple(given.image),
        prompt=given.prompt,
        output=given.output,
        profile=given.profile,
    )


def program(main: Callable[[list[str]], T]) -> T:
    """Runs a benchmark with the options of its command line; ends it with one line where these cannot be used."""
    try:
        return main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def _is_replay(arm: str) -> bool:
    try:
        return arm.startswith(REPLAY) and 0.0 <= float(arm.removeprefix(REPLAY)) <= 1.0
    except ValueError:
        return False


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
