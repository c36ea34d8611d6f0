"""Test hybrids in an engine: families some of whose layers carry a state, which exists only where it was saved.

That their answers are transformers' own is what the conformance command checks; here: what is shared, when, at what
cost, and that nothing leaks from one sequence to another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model.backends.slot_states import SAVED, SlotStates
from model.bench.replay import ReplayDrafter
from model.engine.engine import Engine
from model.engine.prefix_cache import CALL
from model.request import Medium, Message, Request, SamplingParams
from tests.families import cases
from tests.model import tiny

FAMILIES = ("qwen3_5", "lfm2_vl")  # recurrent and convolutional states; convolutional ones
QUESTION = "Describe the image, and say what you see in each of its corners, please."
OTHER = "How many objects are there, and which of them is the largest?"


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {}


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, saved: Callable[[str], Path], engines: dict[str, Engine]) -> Engine:
    name = request.param
    if name not in engines:
        engines[name] = Engine(tiny.config(saved(name), max_model_len=512, max_num_seqs=4, drafter="off"))
    engines[name].use(None)  # forgets all prefixes
    return engines[name]


def picture(seed: int) -> Medium:
    """Return an image that makes enough tokens to be shared."""
    return cases.image(seed, 120, 90)


def ask(name: str, *content: str | Medium, tokens: int = 12) -> Request:
    """Build a request of one turn."""
    return Request(name, (Message("user", content),), SamplingParams(max_tokens=tokens, ignore_eos=True))


def answer(engine: Engine, request: Request) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many tokens of its prompt were cached."""
    outputs = tiny.drain(engine, [request])[request.request_id]
    stats = outputs[-1].stats
    assert stats is not None
    return tiny.token_ids(outputs), stats.cached_tokens


def cold(engine: Engine, request: Request) -> list[int]:
    """Return the tokens of an answer without any cached prefix, and leave none."""
    engine.prefixes.clear()
    tokens, cached = answer(engine, request)
    assert cached == 0
    engine.prefixes.clear()
    return tokens


def test_a_prompt_is_found_again_up_to_its_call_for_an_answer(engine: Engine) -> None:
    request = ask("1", picture(1), QUESTION)
    length = len(engine.target.prompt(request.messages).ids)
    expected = cold(engine, request)
    assert answer(engine, request) == (expected, 0)
    for _ in range(3):
        assert answer(engine, request) == (expected, length - CALL)


def test_another_question_about_the_same_image_shares_the_image(engine: Engine) -> None:
    one, other = ask("1", picture(1), QUESTION), ask("2", picture(1), OTHER)
    behind = engine.target.prompt(other.messages).spans[0][1]
    expected = cold(engine, one), cold(engine, other)
    answer(engine, one)
    assert answer(engine, other) == (expected[1], behind)
    answer(engine, ask("3", OTHER))
    assert answer(engine, one)[0] == expected[0]


def test_a_conversation_goes_on_from_its_answer(engine: Engine) -> None:
    """The second prompt begins with all tokens of the first one's prompt and answer."""
    request = ask("1", picture(1), QUESTION)
    tokens, _ = answer(engine, request)
    prompt = engine.target.prompt(request.messages)
    sequence = engine.prepare(ask("2", picture(1), QUESTION))
    sequence.prompt.ids[:] = [*prompt.ids, *tokens, *engine.target.prompt((Message("user", (OTHER,)),)).ids]
    sequence.__post_init__()
    engine.add(sequence)
    tiny.drain(engine)
    assert sequence.cached == len(prompt.ids) + len(tokens) - 1


def test_a_running_sequence_shares_what_it_saved(engine: Engine) -> None:
    one, other = ask("1", picture(1), QUESTION, tokens=20), ask("2", picture(1), OTHER)
    expected = cold(engine, one), cold(engine, other)
    outputs = tiny.drain(engine, [one, other], every=6)
    assert (tiny.token_ids(outputs["1"]), tiny.token_ids(outputs["2"])) == expected
    stats = outputs["2"][-1].stats
    assert stats is not None
    assert stats.cached_tokens == engine.target.prompt(other.messages).spans[0][1]


def test_sequences_that_join_leave_and_are_aborted_do_not_touch_each_other(engine: Engine) -> None:
    """Every slot is used several times, moved, and drafted for with trees of which some path is right."""
    requests = []
    for number, length in enumerate((3, 20, 9, 14, 2, 25, 11, 6, 17, 8)):
        shown = [picture(number % 3)] if number % 3 else []
        requests.append(ask(str(number), *shown, (QUESTION, OTHER)[number % 2], tokens=length))
    expected = {request.request_id: cold(engine, request) for request in requests}
    drafter = ReplayDrafter(0.6, engine.target.vocab_size)
    for request in requests:
        drafter.learn(engine.target.prompt(request.messages), expected[request.request_id])
    engine.use(drafter)
    found: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(100):
        if step % 2 == 0 and requests:
            engine.add(requests.pop(0))
        if step == 7:
            engine.abort("1")
        for output in engine.step():
            found[output.request_id] += [token.id for token in output.tokens]
        engine.check_integrity()
    engine.use(None)
    assert not engine.has_work
    aborted = found.pop("1")
    assert 0 < len(aborted) < 20
    assert aborted == expected.pop("1")[: len(aborted)]
    assert found == expected


def test_states_are_part_of_the_memory_plan(engine: Engine) -> None:
    states = engine.target.states
    assert states is not None
    assert states.bytes_per_slot(saving=True) == states.bytes_per_slot(saving=False) * (1 + SAVED)
    each = engine.cache.nbytes // 4
    for settings, number in (
        ({"kv_cache_bytes": 2 * each}, 2),
        ({"kv_cache_bytes": 2 * each - 1}, 1),
        ({"kv_cache_bytes": 2 * each - 1, "prefix_cache": False}, 2),
    ):
        config = tiny.config(Path(engine.config.model), max_model_len=512, max_num_seqs=4, drafter="off", **settings)
        small = Engine(config, engine.target)
        assert small.cache.num_slots == number
        assert small.info.memory["kv_cache"] == small.cache.nbytes <= settings["kv_cache_bytes"]


def test_without_prefix_caching_nothing_is_saved(engine: Engine) -> None:
    settings = {"max_model_len": 512, "max_num_seqs": 2, "drafter": "off", "prefix_cache": False}
    alone = Engine(tiny.config(Path(engine.config.model), **settings), engine.target)
    request = ask("1", picture(1), QUESTION)
    expected = cold(engine, request)
    assert [answer(alone, request) for _ in range(2)] == [(expected, 0)] * 2
    assert isinstance(alone.cache.states, SlotStates)
    assert not any(slot.saved for slot in alone.cache.states._slots)


@pytest.mark.parametrize("engine", ["lfm2_vl"], indirect=True)
@pytest.mark.parametrize("broken", ["start", "share", "exchange", "keep"])
def test_these_tests_see_a_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Leave out one thing at a time that happens to states: some answer above becomes another."""
    settings = {"max_model_len": 512, "max_num_seqs": 4, "drafter": "off"}
    broken_engine = Engine(tiny.config(Path(engine.config.model), **settings), engine.target)
    monkeypatch.setattr(SlotStates, broken, lambda *_: None)
    with pytest.raises(AssertionError):  # noqa: PT012
        test_sequences_that_join_leave_and_are_aborted_do_not_touch_each_other(broken_engine)
        test_another_question_about_the_same_image_shares_the_image(broken_engine)
