"""Test the main promise: the same tokens, however they are computed.

Greedy equals transformers' own `generate`. Greedy and seeded sampling are the same with a draft and without, alone and
in a crowd, joining and leaving, chunked and whole. The tests use an untrained draft (nearly always wrong) and an oracle
(mostly right, see oracle.py), so that paths of every length are accepted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from model.backends.native import library
from model.bench.margins import margin
from model.bench.reference import Reference
from model.decoding import sampling
from model.drafters.flash import native
from model.engine.engine import Engine
from model.engine.scheduler import Chunk, Decoding
from model.request import Medium, Message, Request
from tests.model import tiny
from tests.model.oracle import with_oracle

CONTENTS: dict[str, tuple[str | Medium, ...]] = {
    "image": (tiny.image(1), "Describe the image."),
    "two images": (tiny.image(2), tiny.image(3), "Which is larger, the star or the ring?"),
    "video": (tiny.video(4, 3), "What do you see in the video?"),
    "text": ("How many objects are there? Count them, then say why, and where, and when they were.",),
    "image last": ("What do you see?", tiny.image(5)),
    "short text": ("Hi",),
}
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 8, "min_p": 0.05, "seed": 3},
)


def mixed(number: int = 16) -> list[Request]:
    """Build requests of every kind and length; ids and answers are the same each time."""
    contents = list(CONTENTS.values())
    return [
        tiny.ask(
            f"r{i}",
            *contents[i % len(contents)],
            max_tokens=(24, 7, 31, 1, 16)[i % 5],
            **SAMPLING[i % len(SAMPLING)],
        )
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def expected(plain_engine: Engine) -> dict[str, list[int]]:
    """Answer one request at a time, without a draft, each prompt in one chunk."""
    return {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in mixed()}


# -- against transformers


def generated(folder: Path, content: tuple[str | Medium, ...], max_tokens: int) -> list[int]:
    """Answer with transformers' own pipeline from frames and text to tokens: batch 1, its own cache and attention."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tiny.by_processor(processor, (Message("user", content),), return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_gqa_checkpoint"])
def test_greedy_answers_are_those_of_transformers_generate(checkpoint: str, request: pytest.FixtureRequest) -> None:
    """The reference shares no code with ours: template, features, positions, masks, cache, end of the answer."""
    folder = request.getfixturevalue(checkpoint)
    draft = request.getfixturevalue(checkpoint.replace("checkpoint", "draft"))
    engine = Engine(tiny.config(folder, draft=str(draft), max_num_seqs=8, prefill_chunk=32))
    requests = [tiny.ask(name, *content, max_tokens=40, ignore_eos=False) for name, content in CONTENTS.items()]
    ours = tiny.answers(engine, requests)
    for name, content in CONTENTS.items():
        assert ours[name] == generated(folder, content, 40), name


# -- however it is run


def test_each_request_alone_with_an_untrained_draft(crowd: Engine, expected: dict[str, list[int]]) -> None:
    """Nearly every node is rejected, and its rows in the cache must not be visible."""
    for request in mixed():
        assert tiny.answers(crowd, [request])[request.request_id] == expected[request.request_id]


@pytest.mark.parametrize("every", [0, 1, 3], ids=["at once", "each step", "each third step"])
def test_a_crowd_with_an_untrained_draft(crowd: Engine, expected: dict[str, list[int]], every: int) -> None:
    assert tiny.answers(crowd, mixed(), every=every) == expected


@pytest.mark.parametrize("size", range(1, 17))
def test_a_batch_of_every_size_with_an_oracle(crowd: Engine, expected: dict[str, list[int]], size: int) -> None:
    """A reference implementation broke speculation by batching, for want of this test; no size is left out here."""
    with_oracle(crowd, expected, seed=size)
    requests = mixed()
    requests = requests[size:] + requests[:size]
    assert tiny.answers(crowd, requests[:size]) == {r.request_id: expected[r.request_id] for r in requests[:size]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every", [1, 2, 5])
def test_joining_and_leaving_with_an_oracle(
    crowd: Engine, expected: dict[str, list[int]], seed: int, every: int
) -> None:
    """Short answers end while long prompts are half computed; slots are reused and sequences moved down."""
    with_oracle(crowd, expected, seed=seed, truth=(0.5, 0.75, 0.95)[seed])
    assert tiny.answers(crowd, mixed(), every=every) == expected


def test_the_oracle_really_has_paths_of_every_length_accepted(crowd: Engine, plain_engine: Engine) -> None:
    """Without such paths the tests above would prove nothing."""
    request = tiny.ask("long", tiny.image(7), "What do you see?", max_tokens=150)
    known = tiny.answers(plain_engine, [request])
    accepted = set()
    for seed in range(8):
        oracle = with_oracle(crowd, known, seed=seed, truth=0.85)
        assert tiny.answers(crowd, [request]) == known
        accepted |= oracle.shapes
    assert {a for _, a in accepted} >= set(range(11))
    assert {n for n, _ in accepted} == set(range(1, crowd.config.nodes + 1))


def test_speculation_on_and_off_in_one_batch(crowd: Engine, expected: dict[str, list[int]]) -> None:
    """Trees of one node run beside trees of sixteen; padding of the short ones must have no effect."""
    with_oracle(crowd, expected)
    requests = [Request(r.request_id, r.messages, r.params, speculation=i % 2 == 0) for i, r in enumerate(mixed())]
    outputs = tiny.drain(crowd, requests)
    assert {k: tiny.token_ids(v) for k, v in outputs.items()} == expected
    for i, request in enumerate(requests):
        stats = outputs[request.request_id][-1].stats
        assert stats is not None
        assert stats.drafts == 0 or i % 2 == 0, "a draft for one who asked for none"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_nodes": 0},
        {"max_nodes": 1},
        {"max_nodes": 30, "max_verify_tokens": 500, "tree_width": 8},
        {"tree_width": 1},
        {"max_verify_tokens": 3},
        {"max_num_seqs": 3},
        {"prefill_chunk": 17},
        {"prefill_chunk": 1000},
        {"encoder_cache_bytes": 0},
    ],
    ids=str,
)
def test_no_setting_changes_a_token(
    settings: dict[str, int], tiny_checkpoint: Path, tiny_draft: Path, expected: dict[str, list[int]]
) -> None:
    """These settings may only change speed and memory."""
    engine = Engine(
        tiny.config(tiny_checkpoint, draft=str(tiny_draft), **{"max_num_seqs": 6, "prefill_chunk": 16, **settings})
    )
    assert tiny.answers(engine, mixed(), every=1) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, mixed(), every=1) == expected


def test_compaction_moves_sequences_and_no_token_changes(
    tiny_checkpoint: Path, tiny_draft: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence moved without its draft's context, or with scratch rows, would diverge afterwards."""
    monkeypatch.setattr(library, "load", lambda: None)  # only torch compacts slots; the native stack skips idle ones
    crowd = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=16, prefill_chunk=16))
    moves: list[tuple[int, int]] = []
    exchange = crowd.cache.exchange

    def listen(one: int, other: int) -> None:
        if crowd.cache.lengths[one]:
            moves.append((one, other))
        exchange(one, other)

    monkeypatch.setattr(crowd.cache, "exchange", listen)
    assert tiny.answers(crowd, mixed()) == expected
    assert len(moves) > 3
    assert all(low < high for high, low in moves)


def test_prompts_may_be_read_in_bites_smaller_than_a_picture(
    crowd: Engine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk inside an encoded image has nothing left to encode."""
    schedule = crowd.scheduler.schedule

    def in_bites(free_slots: int) -> Chunk | Decoding | None:
        work = schedule(free_slots)
        return replace(work, end=min(work.end, work.start + 5)) if isinstance(work, Chunk) else work

    monkeypatch.setattr(crowd.scheduler, "schedule", in_bites)
    assert tiny.answers(crowd, mixed()) == expected


def test_a_draft_too_large_for_a_table_says_the_same(
    tiny_checkpoint: Path, tiny_draft: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary, each token's contribution to the draft is computed in every round."""
    monkeypatch.setattr(native, "MAX_TABLE", 0)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=6))
    assert engine.drafter is not None
    assert engine.drafter.native == engine.target.native
    assert tiny.answers(engine, mixed(), every=1) == expected


def test_a_long_answer_to_the_very_last_position(tiny_checkpoint: Path, plain_engine: Engine) -> None:
    """prompt + max_tokens == max_model_len: the last trees reach beyond the capacity, into the margin, no further."""
    requests = [tiny.ask(f"full{i}", tiny.image(i), "Hi", max_tokens=40) for i in range(3)]
    length = len(plain_engine.target.prompt(requests[0].messages).ids) + 40
    known = tiny.answers(plain_engine, requests)
    engine = Engine(tiny.config(tiny_checkpoint, max_num_seqs=3, max_model_len=length))
    with_oracle(engine, known, truth=0.9)
    assert tiny.answers(engine, requests) == known


def test_double_precision_says_the_same_alone_and_in_a_crowd(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    """In float64 there are no near ties to hide behind."""
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=8, dtype="float64"))
    alone = {r.request_id: tiny.answers(engine, [r])[r.request_id] for r in mixed(8)}
    assert tiny.answers(engine, mixed(8), every=1) == alone


def test_transformers_own_layers_say_the_same_as_the_native_ones(
    tiny_checkpoint: Path, tiny_draft: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders that are not built as expected, and those on a GPU, run through the registered attention."""
    monkeypatch.setattr(library, "load", lambda: None)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=6, prefill_chunk=16))
    assert not engine.target.native
    assert tiny.answers(engine, mixed(), every=1) == expected
    with_oracle(engine, expected)
    assert tiny.answers(engine, mixed(), every=1) == expected


def parted(expected: dict[str, list[int]], answers: dict[str, list[int]]) -> dict[str, int]:
    """Find the position at which each wrong answer departs from the expected one."""
    assert expected.keys() == answers.keys()
    places = {
        name: next(
            (at for at, (one, other) in enumerate(zip(expected[name], tokens, strict=False)) if one != other), -1
        )
        for name, tokens in answers.items()
        if tokens != expected[name]
    }
    assert -1 not in places.values(), "an answer that only ends elsewhere is no close call"
    return places


class Judge:
    """Compare transformers in float32 and bfloat16: how close two tokens are, and how much bfloat16 moves them."""

    def __init__(self, folder: Path) -> None:
        self._exact, self._rounded = (
            Reference(str(folder), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
        )

    def excess(self, request: Request, before: list[int], tokens: tuple[int, int]) -> float:
        """Compute how many times larger the gap of two tokens after `before` is than the error of rounding."""
        exact, rounded = (one.logits(request.messages, tuple(before)) for one in (self._exact, self._rounded))
        near = margin(exact, request.params, len(before), tokens)
        if request.params.temperature == 0.0:
            span = exact.max() - exact.min()
            return near / float(2 * (exact - rounded).abs().max() / span)
        one, other = (sampling.distribution(logits[None], request.params).cumsum(-1) for logits in (exact, rounded))
        return near / max(float((one - other).abs().max()), 1e-9)

    def unexplained(
        self, requests: list[Request], expected: dict[str, list[int]], answers: dict[str, list[int]]
    ) -> dict[str, float]:
        """Return the excess of each wrong answer whose difference rounding cannot explain."""
        by_id = {request.request_id: request for request in requests}
        found = {
            name: self.excess(by_id[name], expected[name][:at], (expected[name][at], answers[name][at]))
            for name, at in parted(expected, answers).items()
        }
        return {name: excess for name, excess in found.items() if excess > 2.0}


@pytest.fixture(scope="module")
def judge(tiny_checkpoint: Path) -> Judge:
    return Judge(tiny_checkpoint)


def test_bfloat16_leaves_float32_where_rounding_decides_only(
    tiny_checkpoint: Path, tiny_draft: Path, expected: dict[str, list[int]], judge: Judge
) -> None:
    """Rounding may change a token at a near tie; a wrong mask or position changes tokens anywhere."""
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=8, dtype="bfloat16"))
    answers = tiny.answers(engine, mixed())
    assert judge.unexplained(mixed(), expected, answers) == {}
    shifted = {
        name: [*tokens[:1], (tokens[1] + 7) % tiny.VOCABULARY] for name, tokens in expected.items() if tokens[1:]
    }
    wrong = judge.unexplained(mixed(), {name: expected[name] for name in shifted}, shifted)
    assert len(wrong) > 0.8 * len(shifted), "a judge who excuses any token judges nothing"


@pytest.mark.parametrize(("backend", "number"), [("native", 32), ("torch", 10)])
def test_bfloat16_says_the_same_however_it_is_run(
    tiny_checkpoint: Path,
    tiny_draft: Path,
    judge: Judge,
    backend: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the native library a row's bits do not depend on its batch, so no answer may differ.

    torch promises the same tokens except where rounding decides: an answer may differ there.
    """
    if backend == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=8, dtype="bfloat16"))
    requests = mixed(number)
    alone = {r.request_id: tiny.answers(engine, [r])[r.request_id] for r in requests}
    engine.use(None)
    plain = {r.request_id: tiny.answers(engine, [r])[r.request_id] for r in requests}
    with_oracle(engine, plain)
    crowd = tiny.answers(engine, requests, every=1)
    for answers in (alone, crowd):
        if engine.target.native:
            assert answers == plain
        else:
            assert judge.unexplained(requests, plain, answers) == {}


# -- the randomness of a request is its own


def sampled(engine: Engine, **params: Any) -> list[int]:
    return tiny.answers(engine, [tiny.ask("s", tiny.image(9), "Describe.", **params)])["s"]


def test_a_seed_fixes_the_answer_and_another_seed_another_answer(plain_engine: Engine) -> None:
    first = sampled(plain_engine, temperature=1.0, seed=5)
    assert first == sampled(plain_engine, temperature=1.0, seed=5)
    assert len({tuple(sampled(plain_engine, temperature=1.0, seed=s)) for s in range(5)}) == 5


def test_an_answer_is_the_beginning_of_a_longer_one(plain_engine: Engine) -> None:
    """Randomness by position, not by step: max_tokens only cuts."""
    assert (
        sampled(plain_engine, temperature=1.0, seed=5, max_tokens=9)
        == sampled(plain_engine, temperature=1.0, seed=5, max_tokens=24)[:9]
    )
