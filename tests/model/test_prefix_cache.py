"""Test prefix caching: common prefixes are computed once and nothing else is, by answers and by counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from model.backends.native import library
from model.config import TRAINED
from model.engine.encoder_cache import EncoderCache
from model.engine.engine import Engine
from model.engine.prefix_cache import LEAST, Contents, PrefixCache
from model.request import Medium, Message, Request, RequestError, SamplingParams, VideoMetadata
from model.targets.prompt import TokenizedPrompt
from tests.model import tiny, tiny_qwen
from tests.model.guided import guided
from tests.model.test_equality import CONTENTS

NAMES = ("off", *TRAINED, "ngram")
SHARING = ("off", "flash", "flash-paper", "medusa", "ngram")  # eagle's context cannot be copied

# -- what is shared


def contents(*parts: str | Medium, salt: str = "") -> Contents:
    """Build a prompt's contents from parts: a letter is one token, a medium four."""
    ids, media, spans = list[int](), list[Medium](), list[tuple[int, int]]()
    for part in parts:
        if isinstance(part, Medium):
            media.append(part)
            spans.append((len(ids), len(ids) + 4))
            ids += [0] * 4
        else:
            ids += map(ord, part)
    return Contents.of(TokenizedPrompt(ids, tuple(media), tuple(spans)), salt)


RED, BLUE = tiny.image(1), tiny.image(2)
SOURCE = VideoMetadata(total_frames=20, fps=10.0, duration=2.0, width=64, height=48)
CLIP = Medium(
    "video",
    np.concatenate((RED.frames, BLUE.frames)),
    seconds_per_frame=0.5,
    frame_times=(0.0, 0.5),
    source=SOURCE,
    options=(("max_pixels", 4096),),
)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (("abc",), ("abd",), 2),
        (("abc",), ("abc",), 3),
        (("abc",), ("ab",), 2),
        (("ab", RED, "c"), ("ab", RED, "d"), 6),
        (("ab", RED, "c"), ("ab", BLUE, "c"), 2),
        ((RED, BLUE), (RED, RED), 4),
        ((RED,), ("x",), 0),
        ((Medium("image", RED.frames),), (RED,), 4),
        ((Medium("video", RED.frames),), (RED,), 0),
        ((Medium("video", RED.frames, 0.5),), (Medium("video", RED.frames, 0.25),), 0),
    ],
)
def test_text_is_shared_to_the_first_other_token_and_media_as_a_whole(
    one: tuple[str | Medium, ...], other: tuple[str | Medium, ...], shared: int
) -> None:
    assert contents(*one).shared_with(contents(*other), 99) == shared
    assert contents(*other).shared_with(contents(*one), 99) == shared


@pytest.mark.parametrize(
    ("change", "features_too"),
    [
        ({}, True),
        ({"seconds_per_frame": 0.25}, True),
        ({"frame_times": (0.0, 0.6)}, True),
        ({"frame_times": None}, True),
        ({"source": replace(SOURCE, fps=20.0)}, True),
        ({"source": replace(SOURCE, duration=2.5)}, True),
        ({"source": None}, True),
        ({"options": (("max_pixels", 4097),)}, False),
        ({"options": (("min_pixels", 4096),)}, False),
        ({"options": (("max_pixels", 4096.0),)}, False),
        ({"options": ()}, False),
        ({"kind": "image"}, False),
        ({"frames": CLIP.frames[::-1]}, False),
    ],
    ids=str,
)
def test_times_and_options_of_a_medium_are_part_of_what_it_is(change: dict[str, object], features_too: bool) -> None:
    """Families write times into the prompt, which the features do not depend on; options change both."""
    other = replace(CLIP, **change)  # type: ignore[arg-type]
    assert contents(CLIP).shared_with(contents(other), 99) == (0 if change else 4)
    assert contents(replace(CLIP)).shared_with(contents(CLIP), 99) == 4
    cache = EncoderCache(1000, "v")
    assert (cache.key(CLIP) == cache.key(other)) == features_too


def test_parts_of_a_video_keep_their_times() -> None:
    second = CLIP.frames_between(1, 2)
    assert (second.frame_times, second.source, second.options) == ((0.5,), CLIP.source, CLIP.options)
    assert np.array_equal(second.frames, BLUE.frames)
    assert RED.frames_between(0, 1).frame_times is None


@pytest.mark.parametrize(
    "times", [(0.0,), (0.0, 0.5, 1.0), (0.5, 0.0), (-1.0, 0.0), (0.0, float("inf")), (0.0, float("nan"))]
)
def test_times_that_cannot_be_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="frame_times"):
        replace(CLIP, frame_times=times)


def test_no_medium_is_cut_and_no_limit_exceeded() -> None:
    text = contents("ab", RED, "c")
    assert [text.shared_with(text, most) for most in (7, 6, 5, 3, 2, 1)] == [7, 6, 2, 2, 2, 1]


def test_numbers_that_agree_by_chance_are_not_enough() -> None:
    """A part of the digest represents a medium, but all of it is compared."""
    one, other = contents(RED, "a"), contents(BLUE, "a")
    assert one.shared_with(replace(other, keys=one.keys), 99) == 0


def test_another_salt_shares_nothing() -> None:
    assert contents("abc").shared_with(contents("abc", salt="s"), 99) == 0
    assert contents("abc", salt="s").shared_with(contents("abc", salt="s"), 99) == 3


def test_the_longest_is_found_and_the_stalest_given_up() -> None:
    cache = PrefixCache(enabled=True)
    for slot, text in enumerate(("a" * 40, "a" * 30 + "b" * 10, "c" * 40)):
        cache.hold(slot, contents(text), 40, drafted=slot == 1)
    assert cache.best(contents("a" * 50), 49, drafted=False) == (0, 40)
    assert cache.best(contents("a" * 50), 49, drafted=True) == (1, 30)
    assert cache.best(contents("a" * 50), 20, drafted=False)[1] == 20
    assert cache.best(contents("d" * 50), 49, drafted=False)[1] == 0
    assert cache.best(contents("a" * (LEAST - 1)), 99, drafted=False)[1] == 0, "too few to be worth it"
    assert cache.choose([0, 1, 2], 1, 0) == 2, "the others were of use since"
    assert cache.choose([0, 1, 2, 3], 1, 0) == 3, "it holds nothing"
    assert cache.choose([0, 1, 2], 1, 30) == 1, "most of it is used again"
    assert cache.choose([0, 1, 2], 1, 19) == 2, "most of it may be of use to another"
    assert cache.choose([0, 2], 1, 30) == 2, "it is taken"
    cache.forget_drafts()
    assert cache.best(contents("a" * 50), 49, drafted=True)[1] == 0
    cache.hold(0, contents("a" * 40), 17, drafted=False)
    cache.forget(1)
    assert cache.best(contents("a" * 50), 49, drafted=False) == (0, 17)
    cache.exchange(0, 3)
    assert cache.best(contents("a" * 50), 49, drafted=False) == (3, 17)
    cache.exchange(3, 2)
    assert cache.best(contents("a" * 50), 49, drafted=False) == (2, 17)
    assert cache.best(contents("c" * 50), 49, drafted=False) == (3, 40)
    cache.clear()
    cache.exchange(0, 3)
    assert cache.best(contents("a" * 50), 49, drafted=False)[1] == 0


# -- in the engine


engine_of = partial(tiny.engine_of, max_num_seqs=4)
QUESTION = "Which is larger, the star or the ring, and what is to the left of it?"


def conversation() -> list[Request]:
    """Build requests with common prefixes: questions about one picture, two pictures, a second turn, videos."""
    said = "It is the ring, I think, and to the left of it there is nothing at all."
    turns = (Message("user", (RED, QUESTION)), Message("assistant", (said,)), Message("user", ("And the star?",)))
    return [
        tiny.ask("first", RED, QUESTION),
        tiny.ask("again", RED, QUESTION, temperature=1.0, seed=1),
        tiny.ask("other", RED, QUESTION + " Why?"),
        tiny.ask("two", RED, BLUE, QUESTION),
        tiny.ask("turned", BLUE, RED, QUESTION),
        Request("next", turns, SamplingParams(max_tokens=24, ignore_eos=True)),
        tiny.ask("video", tiny.video(4, 3), QUESTION),
        tiny.ask("longer", tiny.video(4, 3), RED, QUESTION),
    ]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, list[int]]:
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=1, prefix_cache=False))
    return {r.request_id: tiny.answers(engine, [r])[r.request_id] for r in conversation()}


@pytest.fixture(params=["native", "torch"])
def _computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in the native library, if there is one, and in torch."""
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    elif library.load() is None:
        pytest.skip("no native library here")


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("name", NAMES)
def test_one_after_the_other(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    engine = engine_of(name, tiny_checkpoint, drafts)
    for _ in range(2):
        for request in conversation():
            assert tiny.answers(engine, [request])[request.request_id] == expected[request.request_id]
    stats = engine.pop_stats()
    shares = name in SHARING
    assert stats.prefix_cache_hits > stats.prefix_cache_queries / 4 if shares else stats.prefix_cache_hits == 0
    assert stats.prompt_tokens == stats.prefix_cache_queries, "what was taken over counts as read"


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("every", [0, 1, 5], ids=["at once", "each step", "each fifth step"])
@pytest.mark.parametrize("name", NAMES)
def test_beside_each_other(
    name: str, every: int, tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    """Prefixes are also copied from sequences that are still running."""
    engine = engine_of(name, tiny_checkpoint, drafts)
    assert tiny.answers(engine, conversation(), every=every) == expected
    if name in SHARING:
        assert engine.pop_stats().prefix_cache_hits > 0


def test_a_sequence_that_moves_takes_what_is_known_of_its_slot_along(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch sequences move to low slots, and the slots that they leave are overwritten."""
    monkeypatch.setattr(library, "load", lambda: None)
    engine = engine_of("flash", tiny_checkpoint, drafts)
    asked = {r.request_id: r for r in conversation()}
    for name in ("two", "first"):
        engine.add(asked[name])
    while len(engine.scheduler.running) < 2 or any(s.prefilling for s in engine.scheduler.running):
        engine.step()
    engine.abort("two")
    engine.step()
    assert [s.slot for s in engine.scheduler.running] == [0], "it has moved"
    engine.step()
    told = tiny.answers(engine, [asked["other"], asked["again"]])
    assert all(told[name] == expected[name] for name in ("other", "again"))
    assert engine.pop_stats().prefix_cache_hits > 0


def test_after_an_abort_what_was_computed_is_still_good(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    engine = engine_of("flash", tiny_checkpoint, drafts)
    asked = {r.request_id: r for r in conversation()}
    for steps in range(1, 12):  # in its prompt, in its answer
        engine.add(replace(asked["first"], request_id="gone"))
        for _ in range(steps):
            engine.step()
        engine.abort("gone")
        assert tiny.answers(engine, [asked["other"]])["other"] == expected["other"]


def test_a_new_draft_has_read_nothing_of_it(
    tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    engine = engine_of("flash", tiny_checkpoint, drafts)
    first, again = conversation()[:2]
    tiny.drain(engine, [first])
    engine.swap(engine.pack_draft(engine.read_draft(str(drafts["flash"]))))
    assert tiny.answers(engine, [again])["again"] == expected["again"]
    assert engine.pop_stats().prefix_cache_hits == 0
    assert tiny.answers(engine, [first])["first"] == expected["first"]
    assert engine.pop_stats().prefix_cache_hits > 0


def test_it_can_be_turned_off(tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]) -> None:
    engine = engine_of("flash", tiny_checkpoint, drafts, prefix_cache=False)
    for request in conversation():
        assert tiny.answers(engine, [request])[request.request_id] == expected[request.request_id]
    assert engine.pop_stats().prefix_cache_hits == 0


@pytest.mark.parametrize("name", ["flash", "flash-paper", "medusa", "ngram"])
def test_a_drafter_proposes_the_same(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    """Its context includes the cached prefix; without it drafts would get worse unnoticed."""
    proposed = []
    for prefix_cache in (True, False):
        engine = engine_of(name, tiny_checkpoint, drafts, prefix_cache=prefix_cache)
        trees = guided(engine, expected, seed=3).trees
        for request in conversation():
            tiny.drain(engine, [request])
        proposed.append({known: paths for known, paths in trees.items() if known[0] != "first"})
        trees.clear()
        tiny.drain(engine, conversation(), every=1)
        proposed.append(dict(trees))
        assert (engine.pop_stats().prefix_cache_hits > 0) == prefix_cache
    alone, crowd, alone_without, crowd_without = proposed
    for one, other in ((alone, alone_without), (crowd, crowd_without)):
        common = one.keys() & other.keys()
        assert len(common) >= 5, "too few steps to compare: which tokens were accepted differs with the time taken"
        assert all(one[known] == other[known] for known in common)


def test_what_is_taken_over_is_told(tiny_checkpoint: Path, drafts: dict[str, Path]) -> None:
    engine = engine_of("flash", tiny_checkpoint, drafts)
    first, again = conversation()[:2]
    cached = []
    for request in (first, again, replace(again, salt="a key's")):
        (outputs,) = tiny.drain(engine, [request]).values()
        stats = outputs[-1].stats
        assert stats is not None
        cached.append((stats.prompt_tokens, stats.cached_tokens))
    (length, none), (_, most), (_, salted) = cached
    assert (none, most, salted) == (0, length - 1, 0)
    stats_now = engine.pop_stats()
    assert (stats_now.encoder_cache_queries, stats_now.encoder_cache_hits) == (3, 1), "its picture was not looked up"


def test_a_crowd_of_the_same_reads_its_prompt_once(tiny_checkpoint: Path, drafts: dict[str, Path]) -> None:
    """The choices of one request do this."""
    engine = engine_of("flash", tiny_checkpoint, drafts)
    asks = [tiny.ask(f"c{seed}", RED, QUESTION, temperature=1.0, seed=seed) for seed in range(4)]
    alone = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=1, prefix_cache=False))
    assert tiny.answers(engine, asks) == {ask.request_id: tiny.answers(alone, [ask])[ask.request_id] for ask in asks}
    stats = engine.pop_stats()
    length = stats.prompt_tokens // 4
    assert stats.prefix_cache_hits == 3 * (length - 1)


@pytest.mark.parametrize("every", [0, 3])
def test_qwens_pictures_and_clips_keep_their_places(
    qwen_checkpoint: Path, qwen_draft: Path, qwen_plain: Engine, every: int
) -> None:
    """Positions after a medium depend on its size and time base: the same frames at another rate differ."""
    picture, clip = tiny_qwen.image(1), tiny_qwen.video(2)
    slow = Medium("video", clip.frames, 1.6)
    shown: list[tuple[str | Medium, ...]] = [(picture,), (picture, "Why?"), (clip,), (slow,), (clip, picture)]
    asks = [tiny.ask(f"q{i}", *media, QUESTION) for i, media in enumerate(shown)]
    alone = {ask.request_id: tiny.answers(qwen_plain, [ask])[ask.request_id] for ask in asks}
    engine = Engine(tiny.config(qwen_checkpoint, draft=str(qwen_draft), max_num_seqs=3, max_model_len=384))
    assert tiny.answers(engine, asks, every=every) == alone
    for ask in asks:
        assert tiny.answers(engine, [ask])[ask.request_id] == alone[ask.request_id]
    assert engine.pop_stats().prefix_cache_hits > 0


def test_many_conversations_that_come_and_go(tiny_checkpoint: Path, drafts: dict[str, Path]) -> None:
    """Three slots serve prompts with much, little and nothing in common.

    Answers have every length, and end by abort or by themselves, so slots contain all kinds of remains.
    """
    rng = np.random.default_rng(0)
    engine = engine_of("flash", tiny_checkpoint, drafts, max_num_seqs=3)
    plain = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=1, prefix_cache=False))
    words = [f"word{i} of a long text that goes on" for i in range(6)]
    kinds = list(CONTENTS.values())
    asks = []
    for number in range(40):
        text = " ".join(words[: rng.integers(1, 7)])
        medium = [part for part in kinds[rng.integers(len(kinds))] if isinstance(part, Medium)]
        asks.append(tiny.ask(f"r{number}", *medium, text, max_tokens=int(rng.integers(1, 20))))
    expected = {ask.request_id: tiny.answers(plain, [ask])[ask.request_id] for ask in asks}
    coming, told, steps = list(asks), dict[str, list[int]](), 0
    while coming or engine.has_work:
        if coming and rng.random() < 0.4:
            engine.add(coming.pop(0))
        if steps % 9 == 8 and engine.scheduler.running:
            engine.abort(engine.scheduler.running[0].request.request_id)
        steps += 1
        for output in engine.step():
            told.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
        engine.check_integrity()
    assert all(tokens == expected[name][: len(tokens)] for name, tokens in told.items())
    assert sum(map(len, told.values())) > 80  # the tokens before an abort depend on the steps
    assert engine.pop_stats().prefix_cache_hits > 300
