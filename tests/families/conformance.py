"""Compares the engine with transformers' own `generate` for whole families, in every way that requests can run.

    python -m tests.families.conformance [--families a,b] [--modes alone,batch] [--torch] [--keep FOLDER]

Prints a matrix of families, media and modes as Markdown, then every difference. A difference is a tie if float64 puts
the two tokens closer together than float32 can tell apart; any other one fails, and so does an error. Exits with 1
then.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from model.backends.native import library
from model.bench.margins import margin
from model.bench.replay import ReplayDrafter
from model.drafters import checkpoint
from model.engine.engine import Engine
from model.request import Grammar, Request, RequestOutput, SamplingParams
from tests.families import cases
from tests.families.reference import Answer, Reference
from tests.families.zoo import POSITIONS, Family, families
from tests.model import tiny

NUM_TOKENS = 24
LENGTHS = (1.0, 0.3, 0.7, 0.15, 0.5)  # of answers in a batch, as shares: they leave at different steps
TIE = 1e-4  # of the range of all logits, or of probability: closer than this is a tie
COARSE = 0.1  # likewise, for first tokens in bfloat16
ACCURACY = 0.7
COMMON: dict[str, Any] = {"max_model_len": POSITIONS, "max_num_seqs": 8, "prefill_chunk": 1024}
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 8, "min_p": 0.05, "seed": 3},
)

OBJECT = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "shape": {"enum": ["circle", "square"]}},
    "required": ["count", "shape"],
    "additionalProperties": False,
}
GRAMMARS = (
    Grammar("json_schema", json.dumps(OBJECT)),
    Grammar("regex", "[a-z ]{3,12}, (yes|no)"),
    Grammar("choice", json.dumps(["a circle", "a square", "schön"])),
)
WRITTEN = re.compile(
    r'\{"count": [0-9]{1,2}, "shape": "(circle|square)"\}|[a-z ]{3,12}, (yes|no)|a circle|a square|schön'
)


@dataclass(frozen=True)
class Difference:
    """One answer that is not as expected, or an error in place of answers."""

    mode: str
    medium: str
    reason: str
    tie: bool = False

    def __str__(self) -> str:
        return f"{self.mode}, {self.medium}: {self.reason}"


@dataclass
class Result:
    """The differences of one family. tried: the modes that ran, each with the media of its requests."""

    family: str
    tried: dict[str, set[str]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    cached: int = 0  # prompt tokens that the warm prefix cache had

    @property
    def failures(self) -> list[Difference]:
        """Return the differences that are no ties."""
        return [one for one in self.differences if not one.tie]


class Subject:
    """A family's checkpoint with the reference's answers and the engines that answer."""

    def __init__(self, family: Family, folder: Path, media: Iterable[str] = (), num_tokens: int = NUM_TOKENS) -> None:
        """media: names of conversations, all if empty; num_tokens: of the longest answers."""
        self.family, self.folder, self.num_tokens = family, folder, num_tokens
        wanted = set(media)
        self.conversations = {
            name: messages for name, messages in cases.conversations(family).items() if not wanted or name in wanted
        }
        self._engines: dict[str, Engine] = {}

    @cached_property
    def answers(self) -> dict[str, Answer]:
        """Return the reference's answers by conversation."""
        reference = Reference(self.folder, backend=self.family.backend)
        return {name: reference.answer(messages, self.num_tokens) for name, messages in self.conversations.items()}

    @cached_property
    def exact(self) -> Reference:
        """Return the reference in float64."""
        return Reference(self.folder, torch.float64, backend=self.family.backend)

    def engine(self, **settings: Any) -> Engine:
        """Return an engine with these settings; all share one target."""
        key = str(settings)
        if key not in self._engines:
            target = next((engine.target for engine in self._engines.values()), None)
            self._engines[key] = Engine(tiny.config(self.folder, **COMMON | {"drafter": "off"} | settings), target)
        return self._engines[key]

    @cached_property
    def draft(self) -> Path:
        """Save an untrained FLASH draft and return its folder."""
        folder, target = self.folder.with_name(self.folder.name + "-draft"), self.engine().target
        checkpoint.save(folder, tiny.new_draft(target), target, command="a test")
        return folder

    def with_flash(self) -> Engine:
        """Return an engine with that draft."""
        return self.engine(drafter="flash", draft=str(self.draft))

    def forget(self) -> None:
        """Drop the engines: an error may have left them in any state."""
        self._engines.clear()

    def requests(self, number: int | None = None, *, num_tokens: int | None = None, **params: Any) -> list[Request]:
        """Build mixed requests with answers of different lengths; without `number`, one to each conversation, with
        answers of `num_tokens` or as long as the reference's."""
        names = list(self.conversations)
        found = []
        for i in range(len(names) if number is None else number):
            name, share = names[i % len(names)], 1.0 if number is None else LENGTHS[i % len(LENGTHS)]
            most = max(1, int(share * (num_tokens or self.num_tokens)))
            sampling = SamplingParams(max_tokens=most, ignore_eos=True, **params)
            found.append(Request(f"{name}/{i}", self.conversations[name], sampling))
        return found

    def sampled(self) -> list[Request]:
        """Build requests with seeded sampling."""
        return [
            replace(request, params=replace(request.params, **SAMPLING[i % len(SAMPLING)]))
            for i, request in enumerate(self.requests(8))
        ]

    def settled(self, request: Request, expected: list[int], found: list[int]) -> tuple[str, bool]:
        """Describe the first difference, and return whether it is a tie."""
        at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), -1)
        if at < 0:
            return f"{len(found)} tokens, expected {len(expected)}", False
        logits = self.exact.logits(request.messages, expected[:at]).double()
        gap = margin(logits, request.params, at, (expected[at], found[at]))
        return f"token {at} is {found[at]}, expected {expected[at]}, gap {gap:.1e}", gap < TIE


def medium(request_id: str) -> str:
    """Return the name of the conversation that a request is about."""
    return request_id.split("/", maxsplit=1)[0]


Outputs = Mapping[str, list[RequestOutput]]


class Trial:
    """One mode's run over one subject; collects the differences."""

    def __init__(self, subject: Subject, result: Result, mode: str) -> None:
        self.subject, self.result, self.mode = subject, result, mode

    def differ(self, name: str, reason: str, *, tie: bool = False) -> None:
        """Add a difference."""
        self.result.differences.append(Difference(self.mode, name, reason, tie))

    def run(self, engine: Engine, requests: list[Request], *, every: int = 0) -> dict[str, list[RequestOutput]]:
        """Run requests; errors of single ones count as differences, and their answers are left out."""
        outputs = tiny.drain(engine, requests, every=every)
        for request_id, each in list(outputs.items()):
            if each[-1].finish_reason == "error":
                self.differ(medium(request_id), f"refused: {each[-1].error}")
                del outputs[request_id]
        return outputs

    def must(self, outputs: Outputs, counter: str, what: str) -> None:
        """Add a difference if a counter of `RequestStats` is zero for all requests: the mode then shows nothing."""
        stats = [each[-1].stats for each in outputs.values()]
        if outputs and not any(getattr(one, counter) for one in stats if one is not None):
            self.differ("all", what)

    def compare(self, requests: list[Request], outputs: Outputs, expected: Mapping[str, list[int]]) -> None:
        """Compare answers with the expected ones."""
        for request in requests:
            if request.request_id not in outputs:
                continue
            found, known = tiny.token_ids(outputs[request.request_id]), expected[request.request_id]
            if found != known:
                reason, tie = self.subject.settled(request, known, found)
                self.differ(medium(request.request_id), reason, tie=tie)

    def greedy(self, engine: Engine, requests: list[Request], *, every: int = 0) -> Outputs:
        """Run greedy requests and compare them with transformers."""
        answers = self.subject.answers
        outputs = self.run(engine, requests, every=every)
        known = {r.request_id: answers[medium(r.request_id)].tokens[: r.params.max_tokens] for r in requests}
        self.compare(requests, outputs, known)
        return outputs


# -- modes


def prompts(trial: Trial) -> None:
    """The token ids are those of the family's processor."""
    target = trial.subject.engine().target
    for name, messages in trial.subject.conversations.items():
        ids, known = list(target.prompt(messages).ids), trial.subject.answers[name].prompt
        if ids != known:
            at = next((i for i, pair in enumerate(zip(ids, known, strict=False)) if pair[0] != pair[1]), -1)
            trial.differ(name, f"prompt of {len(ids)} tokens, expected {len(known)}; differs from token {at}")


def alone(trial: Trial) -> None:
    """One request at a time, its prompt in one piece; also compares the log-probabilities."""
    engine = trial.subject.engine()
    for request in trial.subject.requests(logprobs=1):
        outputs = trial.greedy(engine, [request])
        for name, each in outputs.items():
            logits = trial.subject.answers[medium(name)].logits.log_softmax(-1)
            tokens = tiny.token_ids(each)
            if tokens != trial.subject.answers[medium(name)].tokens:
                continue
            ours = torch.tensor([one.chosen.logprob for output in each for one in output.logprobs or ()])
            known = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
            error = float((ours - known).abs().max())
            if error > 1e-3 * max(1.0, float(logits.std())):
                trial.differ(medium(name), f"log-probabilities are off by {error:.1e}")


def batch(trial: Trial) -> None:
    """Eight mixed requests that join at each step and leave at different ones."""
    trial.greedy(trial.subject.engine(), trial.subject.requests(8), every=1)


def chunks(size: int) -> Callable[[Trial], None]:
    """Prompts in chunks of this size, in a batch."""

    def mode(trial: Trial) -> None:
        trial.greedy(trial.subject.engine(prefill_chunk=size), trial.subject.requests(8), every=1)

    return mode


def prefixes(trial: Trial) -> None:
    """The same prompts with a cold and a warm prefix cache, and a conversation that goes on from a cached one."""
    engine = trial.subject.engine(prefill_chunk=64)
    first = trial.subject.requests(num_tokens=min(8, trial.subject.num_tokens))
    for request in first:
        trial.greedy(engine, [request])
    for request in first:
        outputs = trial.greedy(engine, [request])
        trial.must(outputs, "cached_tokens", "a prompt asked before was not cached")
        stats = [each[-1].stats for each in outputs.values()]
        trial.result.cached += sum(one.cached_tokens for one in stats if one is not None)
    messages = trial.subject.conversations.get("turns", ())
    beginnings = [Request(f"turns/{n}", messages[:n], first[0].params) for n in (2, 4) if n < len(messages)]
    for request in beginnings:
        trial.run(engine, [request])
    trial.greedy(engine, [request for request in first if medium(request.request_id) == "turns"])
    trial.greedy(engine, trial.subject.requests(8), every=2)


def flash(trial: Trial) -> None:
    """Speculation by an untrained draft: nearly every node is rejected. Alone and in a batch."""
    engine = trial.subject.with_flash()
    for request in trial.subject.requests():
        trial.greedy(engine, [request])
    trial.must(trial.greedy(engine, trial.subject.requests(8), every=1), "draft_tokens", "nothing was drafted")


def ngram(trial: Trial) -> None:
    """Speculation by repeated text."""
    trial.greedy(trial.subject.engine(drafter="ngram"), trial.subject.requests(8), every=1)


def replayed(engine: Engine, requests: list[Request], known: Mapping[str, list[int]]) -> None:
    """Let the engine draft from known answers, of which each token is right with probability `ACCURACY`."""
    drafter = ReplayDrafter(ACCURACY, engine.target.vocab_size)
    for request in requests:
        drafter.learn(engine.target.prompt(request.messages), known[request.request_id])
    engine.use(drafter)


def replay(trial: Trial) -> None:
    """Speculation of which about 0.7 is right: paths of every length are kept. Alone and in a batch."""
    engine, requests = trial.subject.engine(), trial.subject.requests()
    replayed(engine, requests, {r.request_id: trial.subject.answers[medium(r.request_id)].tokens for r in requests})
    for request in requests:
        trial.greedy(engine, [request])
    outputs = trial.greedy(engine, trial.subject.requests(8), every=1)
    trial.must(outputs, "accepted_tokens", "no draft token was accepted")
    engine.use(None)


def sampling(trial: Trial) -> None:
    """Seeded sampling: the same with speculation and without, alone and in a batch."""
    engine, requests = trial.subject.engine(), trial.subject.sampled()
    plain: dict[str, list[RequestOutput]] = {}
    for request in requests:
        plain |= trial.run(engine, [request])
    known = {name: tiny.token_ids(each) for name, each in plain.items()}
    requests = [request for request in requests if request.request_id in known]
    trial.compare(requests, trial.run(engine, requests, every=1), known)
    replayed(engine, requests, known)
    trial.compare(requests, trial.run(engine, requests, every=1), known)
    engine.use(None)
    trial.compare(requests, trial.run(trial.subject.with_flash(), requests, every=1), known)


def grammars(trial: Trial) -> None:
    """Answers that follow a grammar: the same with speculation and without, alone and in a batch."""
    engine = trial.subject.engine()
    requests = [
        replace(request, params=replace(request.params, max_tokens=48, grammar=GRAMMARS[i % len(GRAMMARS)]))
        for i, request in enumerate(trial.subject.sampled())
    ]
    requests[::2] = [replace(request, params=replace(request.params, temperature=0.0)) for request in requests[::2]]
    plain: dict[str, list[RequestOutput]] = {}
    for request in requests:
        plain |= trial.run(engine, [request])
    for request_id, each in plain.items():
        if each[-1].finish_reason == "stop" and not WRITTEN.fullmatch(tiny.text_of(each)):
            trial.differ(medium(request_id), f"{tiny.text_of(each)!r} is not what the grammar says")
    known = {name: tiny.token_ids(each) for name, each in plain.items()}
    trial.compare(requests, trial.run(engine, requests, every=1), known)
    replayed(engine, requests, known)
    outputs = trial.run(engine, requests, every=1)
    trial.compare(requests, outputs, known)
    trial.must(outputs, "accepted_tokens", "no draft token was accepted")
    engine.use(None)
    trial.compare(requests, trial.run(trial.subject.with_flash(), requests, every=1), known)


def rounded(trial: Trial) -> None:
    """The same in bfloat16, with an untrained draft: rounding moves logits, but the first tokens stay good ones."""
    flash = str(trial.subject.draft)
    engine = Engine(tiny.config(trial.subject.folder, **COMMON, dtype="bfloat16", drafter="flash", draft=flash))
    requests = trial.subject.requests(8)
    for request_id, each in trial.run(engine, requests, every=1).items():
        name = medium(request_id)
        logits = trial.subject.answers[name].logits[0].double()
        gap = margin(logits, requests[0].params, 0, (tiny.token_ids(each)[0],))
        if gap > COARSE:
            trial.differ(name, f"the first token is far from the best: gap {gap:.1e}")


MODES: dict[str, Callable[[Trial], None]] = {
    "prompts": prompts,
    "alone": alone,
    "batch": batch,
    "chunks of 16": chunks(16),
    "chunks of 17": chunks(17),
    "prefix cache": prefixes,
    "flash": flash,
    "ngram": ngram,
    "replay": replay,
    "sampling": sampling,
    "grammar": grammars,
    "bfloat16": rounded,
}


def conform(
    family: Family,
    folder: Path,
    modes: Iterable[str] = MODES,
    media: Iterable[str] = (),
    num_tokens: int = NUM_TOKENS,
) -> Result:
    """Run a family's checkpoint in these modes."""
    subject, result, start = Subject(family, folder, media, num_tokens), Result(family.name), time.perf_counter()
    for mode in modes:
        trial = Trial(subject, result, mode)
        result.tried[mode] = set(subject.conversations)
        try:
            MODES[mode](trial)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            trial.differ("all", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
            subject.forget()
            if mode == "prompts":
                break  # nothing else can run
    result.seconds = time.perf_counter() - start
    return result


# -- report

MEDIA = {"text": "T", "image": "I", "images": "M", "turns": "C", "video": "V", "mixed": "X"}


def cell(result: Result, mode: str) -> str:
    """Return the media that were exact in this mode, by their letters; those in brackets were not."""
    if mode not in result.tried:
        return ""
    wrong = {one.medium for one in result.failures if one.mode == mode}
    names = [name for name in MEDIA if name in result.tried[mode]]
    return "".join(f"({MEDIA[name]})" if wrong & {name, "all"} else MEDIA[name] for name in names)


def table(results: Iterable[Result], modes: Iterable[str]) -> str:
    """Return the matrix as Markdown."""
    names = list(modes)
    lines = [f"| family | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    lines += [f"| {r.family} | {' | '.join(cell(r, mode) for mode in names)} |" for r in results]
    legend = (
        "T text, I one image, M several images, C several turns, V video, X video and image; in brackets: not exact."
    )
    return "\n".join([*lines, "", legend])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.families.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", default=",".join(families()), help="names, separated by commas")
    parser.add_argument("--modes", default=",".join(MODES), help="modes, separated by commas")
    parser.add_argument("--media", default="", help="conversations, separated by commas; all if empty")
    parser.add_argument("--torch", action="store_true", help="run without the native library")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints; a temporary one if left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.torch:
        library.load = lambda: None  # type: ignore[assignment]
    names, modes = options.families.split(","), options.modes.split(",")
    media = [name for name in options.media.split(",") if name]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            family = families()[name]
            folder = family.save((options.keep or Path(temporary)) / name)
            result = conform(family, folder, modes, media)
            results.append(result)
            verdict = f"{len(result.failures)} failures" if result.failures else "exact"
            ties = len(result.differences) - len(result.failures)
            print(f"{name}: {verdict}, {ties} ties, {result.cached} cached, {result.seconds:.1f} s", file=sys.stderr)
            for one in result.failures[:12]:
                print(f"    {one}", file=sys.stderr)
            sys.stderr.flush()
    print(table(results, modes))
    for result in results:
        for one in result.differences:
            print(f"\n- {result.family}, {one}{' (a tie)' if one.tie else ''}", end="")
    failed = [result.family for result in results if result.failures]
    print(f"\n\n{len(results) - len(failed)} of {len(results)} families are exact.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
