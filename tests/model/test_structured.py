"""Answers keep to their grammars, and are the same with speculation and without, alone and together.

About 60 requests of the proof's 500 (python -m tests.schemas.run), on every kind of target and in its sharpest modes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.decoding.grammar import Grammars, Guide
from model.engine.engine import Engine
from model.request import Grammar, Message, Request, SamplingParams
from tests.model import scripted, tiny
from tests.model.scripted import say
from tests.schemas import proof
from tests.schemas.documents import cases
from tests.schemas.proof import MODES, PARAMS, Subject

QUICK: dict[str, tuple[Callable[[Path], Subject], tuple[str, ...]]] = {
    "demo": (lambda _: proof.bundled("demo", 7, max_tokens=90), ("flash, 16", "trees, 16")),
    "demo-qwen": (lambda _: proof.bundled("demo-qwen", 7, max_tokens=60), ("flash, 16",)),
    "torch": (lambda folder: proof.in_torch(folder, 9, max_tokens=40), ("flash, 16", "trees, 16")),
    "scripted": (lambda folder: proof.by_script(folder, 20, max_tokens=160), ("replay, 16", "chunks, 16")),
    "unsure": (lambda folder: proof.by_script(folder, 12, margin=8.0, max_tokens=120), ("ngram, 16", "trees, 16")),
}


@pytest.mark.parametrize("name", QUICK)
def test_answers_keep_to_their_grammars_in_every_mode(tmp_path: Path, name: str) -> None:
    make, modes = QUICK[name]
    subject = make(tmp_path)
    for mode in (proof.ALONE.name, *modes):
        counts = subject.proven(MODES[mode])
        assert counts.faults == [], mode
        assert (counts.valid, counts.begun, counts.different) == (counts.ended, counts.cut, 0)
        assert counts.ended + counts.cut == counts.requests == len(subject.asks)
        assert min(counts.ended, counts.cut) > 0, "both ends are tried"
        if MODES[mode].drafter != "off":
            assert 0 < counts.accepted < counts.drafted, "nodes are accepted, and others refused"


def test_all_pairs_of_form_and_sampling_occur() -> None:
    requests = proof.asks(500, [tiny.image(0), tiny.image(1)], max_tokens=99)
    schemas = {
        ask.form.name
        for ask in requests
        if ask.request.params.grammar == Grammar("json_schema", ask.form.grammar.source)
    }
    assert len(schemas) == 20
    greedy = {ask.form.name for ask in requests if ask.request.params.temperature == 0}
    sampled = {ask.form.name for ask in requests if ask.request.params.temperature > 0}
    assert greedy == sampled == {form.name for form in proof.forms()}
    assert {len(PARAMS), len(proof.forms())} == {13, 25}, (
        "numbers without a common divisor, so that pairs do not repeat"
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return scripted.engine_of(scripted.save(tmp_path_factory.mktemp("structured") / "hermes"), drafter="ngram")


def answers(engine: Engine, *requests: Request) -> dict[str, str]:
    outputs = tiny.drain(engine, requests, every=1)
    assert all(each[-1].finish_reason in ("stop", "length") for each in outputs.values())
    return {name: tiny.text_of(each) for name, each in outputs.items()}


def speaking(name: str, text: str, grammar: Grammar | None, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=params.pop("max_tokens", 300), grammar=grammar, **params)
    return Request(name, (Message("user", ("Answer as JSON. ", say(text))),), sampling)


WRONG = {
    "a number out of bounds": ("person", ("age",), 151),
    "a text that is too long": ("codes", ("word",), "abcdefghij"),
    "an enum's neighbour": ("invoice", ("currency",), "GBP"),
    "a missing property": ("tuples", ("type",), None),
    "a box of three": ("detections", ("objects", 0, "box"), [1, 2, 3]),
    "a wrong format": ("contact", ("id",), "123e4567-e89b-12d3-a456"),
    "a property too many": ("screen_actions", ("actions", 1, "speed"), 3),
    "a number not on the grid": ("measurements", ("even",), 3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_would_break_its_schema_does_not(engine: Engine, wrong: str) -> None:
    """The model says a document up to a wrong value; free it says that value, bound it goes on rightly."""
    name, path, value = WRONG[wrong]
    case = cases()[name]
    document = json.loads(case.samples[0])
    place = document
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    text = json.dumps(document, ensure_ascii=False)
    assert case.faults(text)
    grammar = Grammar("json_schema", case.schema)
    found = answers(
        engine,
        speaking("free", text, None),
        speaking("bound", text, grammar),
        speaking("sampled", text, grammar, temperature=1.0, seed=2),
        replace(speaking("plain", text, grammar), speculation=False),
    )
    assert found["free"] == text
    assert found["bound"] == found["plain"] != text
    assert case.faults(found["bound"]) == []
    right = os.path.commonprefix([text, case.samples[0]]).rstrip('", ')
    assert found["bound"].startswith(right)
    assert found["sampled"].startswith(right)


@pytest.mark.parametrize("text", ["Sure! Here is the JSON you asked for:", "```json\n{", "[1, 2]", "", "null", "{}"])
def test_what_models_say_around_a_document_is_left_out(engine: Engine, text: str) -> None:
    case = cases()["person"]
    found = answers(engine, speaking("talk", text, Grammar("json_schema", case.schema)))
    assert case.faults(found["talk"]) == []


def test_seeds_of_one_prompt_share_its_prefix(engine: Engine) -> None:
    """As n = 3 has it: one prompt, three seeds, three different documents."""
    case = cases()["shapes"]
    requests = [
        Request(
            f"n{seed}",
            (Message("user", ("Draw.", tiny.image(3))),),
            SamplingParams(max_tokens=300, temperature=1.0, seed=seed, grammar=Grammar("json_schema", case.schema)),
        )
        for seed in range(3)
    ]
    together = answers(engine, *requests)
    assert together == {name: text for request in requests for name, text in answers(engine, request).items()}
    assert len(set(together.values())) == 3
    assert [case.faults(text) for text in together.values()] == [[], [], []]


def guide(engine: Engine) -> Guide:
    target = engine.target
    grammars = Grammars(target.tokenizer, target.vocab_size, target.eos_ids, num_cached=1, max_symbols=100_000)
    return grammars.begin(Grammar("json_object"))


def mask_behind(guide: Guide, path: list[int]) -> np.ndarray:
    for token in path:
        guide.advance(token)
    mask = guide.mask()
    assert mask is not None
    return mask


def test_a_guide_that_has_looked_elsewhere_allows_the_same(engine: Engine) -> None:
    """Random paths, by copies of copies that have looked elsewhere, and each in a guide of its own. llguidance's own
    rollback fails this."""
    draw = random.Random(1)
    places: list[tuple[list[int], Guide]] = [([], guide(engine))]
    texts = ("{", '":["', ":", ' [{"', "language", '",["', ' [["', '"', "],", "}]", "332", ": ", "true", ", ")
    pieces = [engine.target.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    fitting = 0
    for _ in range(250):
        path, place = draw.choice(places)
        piece = draw.choice(pieces)
        if draw.random() < 0.5:
            place.mask()
        num = place.fitting(piece)
        fitting += num == len(piece)
        longer, moved = path, place
        for token in piece:  # as a tree goes on, forced text and all
            moved = moved.copy()
            if not moved.allows(token):
                break
            moved.advance(token)
            longer = [*longer, token]
        if len(longer) == len(path) + len(piece):
            assert num == len(piece)
            places.append((longer, moved))
    assert len(places) > 50
    assert fitting < 200
    for path, place in places:
        assert (mask_behind(place, []) == mask_behind(guide(engine), path)).all(), engine.target.tokenizer.decode(path)


def test_a_guide_that_came_back_allows_the_same(engine: Engine) -> None:
    """The shortest way to masks that are wrong after a rollback of llguidance 1.9.1."""
    one, ids = guide(engine), engine.target.tokenizer.convert_tokens_to_ids
    brace, key, colon, inner, word, other, last = map(ids, ["{", '":["', ":", 'Ġ[{"', "language", '",["', 'Ġ[["'])
    mask_behind(one.copy(), [brace, key, colon, inner])
    one.fitting([brace, key, colon, inner, word])
    one.fitting([brace, other])
    path = [brace, key, colon, last]
    assert (mask_behind(one, path) == mask_behind(guide(engine), path)).all()
