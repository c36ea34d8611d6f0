"""Checks that answers keep to their grammar and are the same in every way that requests can run.

A `Subject` is a model with requests; a `Mode` is a way to run them. Of every answer: one that ended by itself is a
document of its schema (or a text of its other grammar), one that was cut begins such a document, and both are token for
token, text for text and reason for reason those of the request alone without a draft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance.hf
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from model.bench.replay import ReplayDrafter
from model.config import EngineConfig
from model.demo import scenes
from model.demo.vision import SIDE
from model.drafters import checkpoint, registry
from model.engine.engine import Engine
from model.request import FinishReason, Grammar, Medium, Message, Request, RequestOutput, SamplingParams
from model.targets.base import Target
from model.targets.registry import load_target
from tests.model import scripted, tiny
from tests.model.oracle import with_oracle
from tests.model.scripted import say
from tests.schemas.documents import Case, cases

TOGETHER = 16  # requests of a batch
ACCURACY = 0.7  # of drafts that know the answer
CLOSE = 1e-3  # log-probabilities that are closer are the same
# Ways to sample. Their number has no divisor in common with that of schemas, so that all pairs occur.
PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"logprobs": 3},
    {"temperature": 1.0, "top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
    {"max_tokens": 17},
    {"temperature": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"min_tokens": 24},
    {"temperature": 0.9, "logprobs": 1},
    {"stop": ('", "', "]}")},
    {"temperature": 1.5, "repetition_penalty": 1.1, "min_tokens": 5},
    {"logit_bias": ((40, 4.0), (41, -100.0), (100, -4.0))},
)


@dataclass(frozen=True)
class Form:
    """A grammar, and whether a text is one of its texts."""

    name: str
    grammar: Grammar
    matches: Callable[[str], bool]
    samples: tuple[str, ...]


def _schema_form(case: Case) -> Form:
    return Form(case.name, Grammar("json_schema", case.schema), lambda text: not case.faults(text), case.samples)


SUM = re.compile(r"\d{1,3}( [+*] \d{1,3}){0,9}")
NOTE = re.compile(r"Note [0-9]{1,2}: [a-z ]{1,30}[.!]")
YES = ("yes", "no", "yes, but not now", "vielleicht — später")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


FORMS: tuple[Form, ...] = (
    Form("json_object", Grammar("json_object"), _is_object, ('{"a": [1, {"b": null}], "c": "d"}', "{}")),
    Form(
        "regex",
        Grammar("regex", NOTE.pattern),
        lambda text: NOTE.fullmatch(text) is not None,
        ("Note 7: all is well.",),
    ),
    Form("choice", Grammar("choice", json.dumps(YES)), lambda text: text in YES, YES),
    Form(
        "lark",
        Grammar("lark", 'start: NUMBER (" " OPERATOR " " NUMBER){0,9}\nNUMBER: /[0-9]{1,3}/\nOPERATOR: "+" | "*"\n'),
        lambda text: SUM.fullmatch(text) is not None,
        ("12 + 3 * 400",),
    ),
    Form(
        "gbnf",
        Grammar("gbnf", 'root ::= item ("," item)*\nitem ::= [a-c] | "(" root ")"\n'),
        lambda text: _is_list(text),
        ("a,(b,(c,a)),b",),
    ),
)


def _is_list(text: str) -> bool:
    """Return whether a text is a list of the GBNF grammar above."""
    previous = None
    while previous != text:
        previous, text = text, re.sub(r"\([a-c](,[a-c])*\)", "a", text)
    return re.fullmatch("[a-c](,[a-c])*", text) is not None


def forms() -> list[Form]:
    """Return the twenty schemas, with another grammar after every fourth."""
    found: list[Form] = []
    for at, case in enumerate(cases().values()):
        found.append(_schema_form(case))
        if at % 4 == 3:
            found.append(FORMS[at // 4])
    return found


@dataclass(frozen=True)
class Ask:
    """A request, its form, and the text that it must get; None if that is the model's own."""

    request: Request
    form: Form
    text: str | None = None


@dataclass(frozen=True)
class Answer:
    """All that must be the same in every mode."""

    tokens: list[int]
    text: str
    reason: FinishReason | None
    logprobs: list[list[tuple[int, float]]]

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> Answer:
        """Join a request's outputs."""
        logprobs = [
            [(each.chosen.id, each.chosen.logprob), *((top.id, top.logprob) for top in each.top)]
            for output in outputs
            for each in output.logprobs or ()
        ]
        return cls(tiny.token_ids(outputs), tiny.text_of(outputs), outputs[-1].finish_reason, logprobs)

    def differs(self, other: Answer) -> str:
        """Say where another answer differs; "" if it does not."""
        if self.tokens != other.tokens:
            pairs = zip(self.tokens, other.tokens, strict=False)
            at = next(
                (at for at, (one, two) in enumerate(pairs) if one != two), min(len(self.tokens), len(other.tokens))
            )
            return f"token {at} of {len(self.tokens)} and {len(other.tokens)}"
        if (self.text, self.reason) != (other.text, other.reason):
            return f"{self.text[-40:]!r}, {self.reason} and {other.text[-40:]!r}, {other.reason}"
        for at, (mine, theirs) in enumerate(zip(self.logprobs, other.logprobs, strict=True)):
            if any(one != two or abs(a - b) > CLOSE for (one, a), (two, b) in zip(mine, theirs, strict=True)):
                return f"log-probabilities of token {at}"
        return ""


@dataclass
class Counts:
    """What was seen of one subject in one mode. faults: each with the request's name."""

    requests: int = 0
    ended: int = 0  # by an end of sequence
    valid: int = 0  # of those
    cut: int = 0  # by max_tokens or a stop string
    begun: int = 0  # of those, that begin a document
    different: int = 0  # from the answer alone and without a draft
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list)


class Subject:
    """A model with requests, and its answers alone and without a draft."""

    def __init__(
        self,
        name: str,
        asks: Callable[[Target], list[Ask]],
        *,
        target: Target,
        draft: str | None,
        config: Mapping[str, Any],
    ) -> None:
        """asks: makes the requests; draft: the folder of a FLASH draft; config: of every engine on this target."""
        self.name, self._make, self.target, self.draft, self._config = name, asks, target, draft, config
        self._engines: dict[str, Engine] = {}

    def engine(self, **settings: Any) -> Engine:
        """Return the engine with these settings. All share one target."""
        key = repr(sorted(settings.items()))
        if key not in self._engines:
            config = EngineConfig(**{**COMMON, **self._config, **settings})
            self._engines[key] = Engine(config, self.target)
        return self._engines[key]

    @cached_property
    def asks(self) -> list[Ask]:
        return self._make(self.target)

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        target = self.target
        return llguidance.hf.from_tokenizer(
            target.tokenizer, n_vocab=target.vocab_size, eos_token=sorted(target.eos_ids)
        )

    @cached_property
    def alone(self) -> tuple[dict[str, Answer], Counts]:
        """The answers alone and without a draft, by request."""
        return self.run(self.engine(), together=False)

    @property
    def known(self) -> dict[str, Answer]:
        return self.alone[0]

    def run(self, engine: Engine, *, together: bool, counts: Counts | None = None) -> tuple[dict[str, Answer], Counts]:
        """Run all requests, one after the other or up to TOGETHER at a time, one joining at each step."""
        requests, counts = [ask.request for ask in self.asks], counts or Counts()
        outputs: dict[str, list[RequestOutput]] = {}
        for batch in [requests] if together else [[request] for request in requests]:
            outputs |= tiny.drain(engine, batch, every=1)
        for each in outputs.values():
            if each[-1].finish_reason == "error":
                counts.faults.append(f"{each[-1].request_id}: {each[-1].error}")
            if (stats := each[-1].stats) is not None:
                counts.drafted += stats.draft_tokens
                counts.accepted += stats.accepted_tokens
                counts.rounds += stats.drafts
                counts.tokens += stats.completion_tokens
        return {name: Answer.of(each) for name, each in outputs.items()}, counts

    def proven(self, mode: Mode) -> Counts:
        """Run all requests in a mode, and check every answer."""
        if mode == ALONE:
            answers, counts = self.alone[0], replace(self.alone[1], faults=list(self.alone[1].faults))
        else:
            engine = mode.start(self)
            answers, counts = self.run(engine, together=mode.together)
            if mode.drafter in KNOWING:
                engine.use(None)
        for ask in self.asks:
            self._check(ask, answers[ask.request.request_id], counts)
        return counts

    def _check(self, ask: Ask, answer: Answer, counts: Counts) -> None:
        """Check one answer by its grammar, and against the known one."""
        name = f"{ask.request.request_id} ({ask.form.name})"
        counts.requests += 1
        tokens = answer.tokens
        if tokens and tokens[-1] in self.target.eos_ids and answer.reason == "stop":
            counts.ended += 1
            if ask.form.matches(answer.text):
                counts.valid += 1
            else:
                counts.faults.append(f"{name}: is no document: {answer.text!r}")
        else:
            counts.cut += 1
            if self.begins(ask.form.grammar, tokens):
                counts.begun += 1
            else:
                counts.faults.append(f"{name}: begins no document: {answer.text!r} {answer.reason}")
        if ask.text is not None and answer.text != ask.text:
            counts.faults.append(f"{name}: {answer.text!r} is not what it was to say")
        if difference := self.known[ask.request.request_id].differs(answer):
            counts.different += 1
            counts.faults.append(f"{name}: differs from alone without a draft: {difference}")

    def begins(self, grammar: Grammar, tokens: Sequence[int]) -> bool:
        """Return whether tokens begin a text of a grammar."""
        matcher = LLMatcher(self.vocabulary, _source(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(list(tokens)) == len(tokens)


def _source(grammar: Grammar) -> str:
    """Write a grammar for llguidance, with any white space."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(grammar.source))))
        case "gbnf":
            return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.source))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


# -- modes

KNOWING = ("replay", "oracle")  # drafters that must know the answers


@dataclass(frozen=True)
class Mode:
    """A way to run requests. settings: of the engine; drafter: "flash", "ngram", or one of KNOWING."""

    name: str
    together: bool
    drafter: str = "off"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def start(self, subject: Subject) -> Engine:
        """Return the subject's engine, ready to run its requests in this mode."""
        settings = dict(self.settings)
        if self.drafter not in KNOWING:
            settings |= {"drafter": self.drafter, "draft": subject.draft if self.drafter == "flash" else None}
        engine = subject.engine(**settings)
        if self.drafter in KNOWING:
            known = {name: answer.tokens for name, answer in subject.known.items()}
        if self.drafter == "replay":
            replay = ReplayDrafter(ACCURACY, engine.target.vocab_size)
            for ask in subject.asks:
                replay.learn(engine.target.prompt(ask.request.messages), known[ask.request.request_id])
            engine.use(replay)
        elif self.drafter == "oracle":
            with_oracle(engine, known)
        return engine


ALONE = Mode("off, alone", together=False)
MODES: Mapping[str, Mode] = {
    mode.name: mode
    for mode in (
        ALONE,
        Mode("off, 16", together=True),
        Mode("flash, alone", together=False, drafter="flash"),
        Mode("flash, 16", together=True, drafter="flash"),
        Mode("ngram, 16", together=True, drafter="ngram"),
        Mode("replay, 16", together=True, drafter="replay"),
        Mode("trees, alone", together=False, drafter="oracle"),
        Mode("trees, 16", together=True, drafter="oracle"),
        Mode("chunks, 16", together=True, drafter="oracle", settings={"prefill_chunk": 16, "prefix_cache": False}),
    )
}


# -- subjects

COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": TOGETHER,
    "max_model_len": 1024,
    "prefill_chunk": 256,
    "adaptive_drafting": False,
    "drafter": "off",
}
LONG = (
    "A shop sells tea, cake and paper. Anna bought five packs of paper for 4.99 each, paid with a card that ends in "
    "0042, and left at noon. The red circle is to the left of the blue square, and two stars are behind it. "
)


def pictures(number: int, side: int) -> list[Medium]:
    """Draw pictures with a few objects."""
    drawn = [scenes.random_image_scene(scenes.scene_seed("heldout", "image", at)) for at in range(number)]
    return [Medium("image", scenes.render(scene, side)[None]) for scene in drawn]


def conversations(images: Sequence[Medium]) -> list[tuple[Message, ...]]:
    """Return conversations of several kinds, to be answered with a document."""
    order = "Describe the image as JSON."
    talk = [Message("user", (images[1], "What do you see?")), Message("assistant", ("A red circle.",))]
    return [
        (Message("user", (images[0], order)),),
        (Message("user", ("Make one up, as JSON.",)),),
        (Message("system", ("You write JSON, and nothing else.",)), Message("user", (LONG * 2,))),
        (*talk, Message("user", (order,))),
        (Message("user", ("Compare ", images[0], " and ", images[1], " as JSON.")),),
    ]


def asks(number: int, images: Sequence[Medium], **common: Any) -> list[Ask]:
    """Make requests of all forms, ways to sample and conversations. common: of SamplingParams."""
    every, talks = forms(), conversations(images)
    found = []
    for at in range(number):
        form = every[at % len(every)]
        params = {"seed": 1000 + at, **common, **PARAMS[at % len(PARAMS)]}
        params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
        messages = talks[(at + at // len(every)) % len(talks)]
        found.append(Ask(Request(f"r{at}", messages, SamplingParams(grammar=form.grammar, **params)), form))
    return found


def bundled(name: str, number: int, max_tokens: int = 220) -> Subject:
    """Return a bundled model with its own draft."""
    config = EngineConfig(**{**COMMON, "model": name, "drafter": "flash"}).resolved()
    target = load_target(config, registry.aux_layers(config))
    return Subject(
        name,
        lambda _: asks(number, pictures(2, SIDE), max_tokens=max_tokens),
        target=target,
        draft=config.draft,
        config={"model": name},
    )


def in_torch(folder: Path, number: int, max_tokens: int = 90) -> Subject:
    """Return a tiny random checkpoint whose passes run in torch: the native library knows no float64."""
    model = tiny.save_checkpoint(folder / "tiny", positions=1024)
    config = {"model": str(model), "dtype": "float64"}
    target = load_target(EngineConfig(**{**COMMON, **config}).resolved())
    checkpoint.save(folder / "tiny-draft", tiny.new_draft(target), target, command="a test")
    images = [tiny.image(1), tiny.image(2)]
    return Subject(
        "tiny, in torch",
        lambda _: asks(number, images, max_tokens=max_tokens),
        target=target,
        draft=str(folder / "tiny-draft"),
        config=config,
    )


def by_script(folder: Path, number: int, margin: float = scripted.MARGIN, max_tokens: int = 260) -> Subject:
    """Return a model that says what large ones say: a document, one of another schema, or one in prose.

    margin: see `ScriptedTarget`; a small one leaves the script now and then.
    """
    model = scripted.save(folder / "scripted")
    config = {"model": str(model)}
    target = scripted.ScriptedTarget(EngineConfig(**{**COMMON, **config}).resolved(), margin=margin)
    checkpoint.save(folder / "scripted-draft", tiny.new_draft(target), target, command="a test")
    return Subject(
        "scripted" if margin == scripted.MARGIN else f"scripted, margin {margin:g}",
        lambda _: list(_scripts(asks(number, [tiny.image(1), tiny.image(2)], max_tokens=max_tokens), margin)),
        target=target,
        draft=str(folder / "scripted-draft"),
        config=config,
    )


NEUTRAL = {"temperature", "top_p", "top_k", "min_p", "logprobs"}  # these do not move the model from its script


def _scripts(every: Sequence[Ask], margin: float) -> Iterator[Ask]:
    """Write scripts into the requests' last messages."""
    for at, ask in enumerate(every):
        samples = ask.form.samples
        text = sample = samples[at // 25 % len(samples)]
        match at % 4:
            case 2:
                text = every[(at + 7) % len(every)].form.samples[0]
            case 3:
                text = f"Sure! Here it is:\n```json\n{sample}\n```"
        last = ask.request.messages[-1]
        message = replace(last, content=(*last.content, say(text)))
        request = replace(ask.request, messages=(*ask.request.messages[:-1], message))
        plain = text == sample and margin == scripted.MARGIN and PARAMS[at % len(PARAMS)].keys() <= NEUTRAL
        yield Ask(request, ask.form, text if plain else None)
