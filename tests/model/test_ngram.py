"""Test drafters without a network: prompt lookup, and the replay of known answers that the benchmark uses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from model.bench.replay import ReplayDrafter
from model.drafters.ngram import LONGEST, NgramDrafter, Text
from model.engine.engine import Engine
from tests.model import tiny

LONG = [tiny.ask(f"r{i}", f"Say {i}", max_tokens=180, temperature=i % 2, seed=i) for i in range(12)]


def test_ngram_finds_the_longest_and_of_those_the_latest() -> None:
    text = Text()
    for token in (1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 1, 2):
        text.add(token)
    assert text.after(3, 3) == [4, 9, 2], "1 2 3 was said once; 2 3 and 3 later, but they are shorter"
    text.add(7)
    assert text.after(3, 2) == [6, 1], "the latest 3"
    assert text.after(8, 4) == []
    assert text.after(9, 20) == [3, 6, 1, 2, 7, 9], "up to the newest token, and not beyond"


def test_ngram_is_what_a_search_through_the_text_finds() -> None:
    rng = random.Random(0)
    for _ in range(20):
        text, tokens = Text(), [rng.randrange(4) for _ in range(60)]
        for at, token in enumerate(tokens):
            whole = tokens[: at + 1]
            found: list[int] = []
            for length in range(min(LONGEST, at + 1), 0, -1):
                starts = [i for i in range(at + 1 - length) if whole[i : i + length] == whole[-length:]]
                if starts:
                    found = whole[starts[-1] + length :][:5]
                    break
            assert text.after(token, 5) == found
            text.add(token)


def test_ngram_does_not_look_at_placeholders_of_media(tiny_checkpoint: Path) -> None:
    """Placeholders are all the same token, so they would match hundreds of times and mean nothing."""
    engine = tiny.engine_of("ngram", tiny_checkpoint, {})
    engine.add(tiny.ask("r", tiny.video(1, 3), "What?", tiny.image(2), "And?", max_tokens=9))
    while not engine.scheduler.running or engine.scheduler.running[0].prefilling:
        engine.step()
    assert isinstance(engine.drafter, NgramDrafter)
    prompt = engine.scheduler.running[0].prompt
    visual = {i for first, last in prompt.spans for i in range(first, last)}
    assert len(visual) == 4 * tiny.TOKENS_PER_IMAGE
    text = [token for i, token in enumerate(prompt.ids) if i not in visual]
    assert engine.drafter._texts[0].tokens[: len(text)] == text
    tiny.drain(engine)


def test_ngram_gains_where_an_answer_repeats_itself(tiny_checkpoint: Path, plain_engine: Engine) -> None:
    known = tiny.answers(plain_engine, [tiny.ask("r", "Hi", max_tokens=100)])["r"]
    told = " ".join(plain_engine.target.tokenizer.convert_ids_to_tokens(known[:4]))
    assert told
    engine = tiny.engine_of("ngram", tiny_checkpoint, {})
    prompt = engine.target.prompt(tiny.ask("r", "Hi").messages)
    engine.add(tiny.ask("r", "Hi", max_tokens=100))
    while not engine.scheduler.running or engine.scheduler.running[0].prefilling:
        engine.step()
    assert isinstance(engine.drafter, NgramDrafter)
    for token in known:  # as if the text had occurred before
        engine.drafter._texts[0].add(token)
    assert prompt.ids
    got = known[:1]
    steps = 0
    while engine.has_work:
        got += [t.id for output in engine.step() for t in output.tokens]
        steps += 1
    assert got == known
    assert steps < 15


@pytest.fixture(scope="module")
def long_answers(plain_engine: Engine) -> dict[str, list[int]]:
    return tiny.answers(plain_engine, LONG)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 0.8, 1.0])
def test_a_replayed_token_is_right_as_often_as_was_asked(
    accuracy: float, tiny_checkpoint: Path, long_answers: dict[str, list[int]]
) -> None:
    """Acceptance length is (1 - a^(n + 1)) / (1 - a) for chains of n; tokens are still the target's own."""
    nodes = 5
    settings = tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=8, max_nodes=nodes)
    replay = ReplayDrafter(accuracy, tiny.VOCABULARY, seed=3)
    engine = Engine(settings, drafter=replay)
    assert engine.info.drafter == f"replay:{accuracy:g} (simulation)"
    for request in LONG:
        replay.learn(engine.target.prompt(request.messages), long_answers[request.request_id])
    assert tiny.answers(engine, LONG, every=1) == long_answers
    stats = engine.pop_stats()
    wanted = sum(accuracy**i for i in range(nodes + 1))
    # Each answer's last steps draft fewer tokens than others.
    assert sum(stats.acceptance_lengths) / len(stats.acceptance_lengths) == pytest.approx(wanted, rel=0.08)


def test_a_replay_of_answers_it_was_not_told_proposes_nothing(tiny_checkpoint: Path, plain_engine: Engine) -> None:
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off"), drafter=ReplayDrafter(1.0, tiny.VOCABULARY))
    request = tiny.ask("r", tiny.image(1), "What?", max_tokens=20)
    assert tiny.answers(engine, [request]) == tiny.answers(plain_engine, [request])
    assert engine.pop_stats().accepted_tokens == 0
