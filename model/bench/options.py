"""The benchmark's options and their help. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from model.config import DRAFTERS, DTYPES, DrafterName, EngineConfig, drafter_of
from model.errors import ConfigError
from model.request import SamplingParams

if TYPE_CHECKING:
    from model.train.manifest import Forms

ARMS = ("generate", "off", *(name for name in DRAFTERS if name not in ("auto", "off")))
TASKS = ("image caption", "image question", "video caption", "video question")  # of the bundled scenes
REPLAY = "replay:"
T = TypeVar("T")
DESCRIPTION = """\
Compares, on the same prompts in one run: transformers' own generate (batched, left-padded), the engine without
speculation (off) and the engine with FLASH (flash); or with other drafters: flash-paper, eagle, medusa (each needs its
own --draft), ngram. replay:0.8 is a simulation: a draft that costs nothing and is right with probability 0.8 a token.

Prompts are held-out scenes of the bundled models, or with --dataset your own: a JSONL file with one object a line,

    {"image": "a.jpg", "prompt": "What is this?"}
    {"video": ["b.mp4"], "prompt": "What happens?", "task": "clips", "max_tokens": 64}

with paths relative to the file, or a folder of images and videos. "task" is the row of the table (default: what the
media are). docs/training.md describes the same format in full. Videos are decoded by `flashserve bench` alone.

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
    tasks: tuple[str, ...]  # empty: all of --dataset
    batches: tuple[int, ...]
    repeats: int
    prompts: int
    max_tokens: int
    sampling: Literal["greedy", "seeded"]
    dataset: Path | None
    images: tuple[Path, ...]
    prompt: str | None
    output: Path | None
    profile: bool
    forms: Forms | None = None  # that lines of --dataset may ask for

    @property
    def draft(self) -> str | None:
        """The first --draft: of one drafter, where only one is measured."""
        return self.drafts[0] if self.drafts else None

    @property
    def engine_config(self) -> EngineConfig:
        """Without caches of media and prompts: these return in every repeat, and no arm is to be spared any work."""
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
        """Return the engine's configuration for a drafter, with the one of the --draft folders that is for it."""
        draft = next((draft for draft in self.drafts if drafter_of(Path(draft)) == drafter), None)
        return replace(self.engine_config, draft=draft, drafter=cast("DrafterName", drafter))

    @property
    def sampling_params(self) -> SamplingParams:
        temperature = 0.0 if self.sampling == "greedy" else 1.0
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=1)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="demo", help="path or id of the target; demo is the bundled one (default)")
    add("--draft", action="append", default=[], help="path of a draft; repeatable, one for each drafter")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", choices=DTYPES, help="of all arms alike (default: auto)")
    add("--threads", type=_positive, help="CPU threads (default: as torch chooses)")
    add("--drafters", default="generate,off,flash", help="which to compare (default: generate,off,flash)")
    add("--dataset", type=Path, metavar="FILE", help="measure on these images, videos and prompts: JSONL, or a folder")
    add(
        "--tasks",
        help=f"of the bundled scenes: {', '.join(TASKS)} (default: the first three); of --dataset (default: all)",
    )
    add("--batches", default="1,4,8,16", help="how many requests at once (default: 1,4,8,16)")
    add("--repeats", type=_positive, help="default: 5")
    add("--prompts", type=_positive, help="prompts per task, the first of --dataset (default: 16)")
    add("--max-tokens", type=_positive, help="longest answer (default: 160)")
    add(
        "--sampling",
        default="greedy",
        choices=("greedy", "seeded"),
        help="seeded: temperature 1; generate then draws its own answers, the other arms the same as each other",
    )
    add("--image", type=Path, action="append", default=[], help="measure on this file; repeatable")
    add("--prompt", help="the prompt for each --image")
    add("--output", type=Path, help="write the JSON object to this file too")
    add(
        "--profile",
        action="store_true",
        help="instead: where the time of a step goes, of off and flash, for the first of --tasks, against what the "
        "machine's memory bandwidth and matrix rate allow; CPU only",
    )
    add("--quick", action="store_true", help="a first impression: 4 prompts, 2 repeats, batches 1 and 4")
    return parser


def read_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    """Check the options; exits with the parser's message where they cannot be used."""
    arms = _split(args.drafters)
    if not arms or not all(arm in ARMS or _is_replay(arm) for arm in arms):
        parser.error(f"--drafters must be some of {', '.join(ARMS)}, {REPLAY}ACCURACY")
    if args.dataset and args.image:
        parser.error("give --dataset or --image, not both")
    if bool(args.image) != bool(args.prompt):
        parser.error("--image and --prompt belong together")
    tasks = _split(args.tasks or "")
    if not args.dataset and not args.image:
        tasks = tuple(task.replace("-", " ") for task in tasks) or TASKS[:3]
        if set(tasks) - set(TASKS):
            parser.error(f"--tasks must be some of {', '.join(TASKS)}")
    batches = "1,4" if args.quick and args.batches == parser.get_default("batches") else args.batches
    try:
        sizes = numbers(batches)
    except argparse.ArgumentTypeError:
        parser.error("--batches must be numbers, such as 1,4,8,16")
    return Options(
        model=args.model,
        drafts=tuple(args.draft),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        arms=(*(arm for arm in ARMS if arm in arms), *dict.fromkeys(arm for arm in arms if arm not in ARMS)),
        tasks=tasks,
        batches=sizes,
        repeats=args.repeats or (2 if args.quick else 5),
        prompts=args.prompts or (4 if args.quick else 16),
        max_tokens=args.max_tokens or 160,
        sampling=args.sampling,
        dataset=args.dataset,
        images=tuple(args.image),
        prompt=args.prompt,
        output=args.output,
        profile=args.profile,
    )


def run_program(main: Callable[[list[str]], T]) -> T:
    """Run a benchmark with the options of its command line; end it with one message where these cannot be used."""
    try:
        return main(sys.argv[1:])
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def numbers(text: str) -> tuple[int, ...]:
    """Read an option such as 1,4,8."""
    try:
        found = tuple(int(part) for part in _split(text))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of at least 1, such as 1,4,8; got {text!r}")
    return found


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
