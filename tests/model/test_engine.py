"""Test a request's life in the engine: refused, waiting, stopped, aborted, failed; and the statistics of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.drafters.flash.drafter import FlashDrafter
from model.engine.encoder_cache import EncoderCache
from model.engine.engine import Engine
from model.errors import ConfigError
from model.request import EngineStats, Medium, Request, RequestError, RequestOutput
from tests.model import tiny
from tests.model.oracle import with_oracle


def long_request(request_id: str = "r", **params: Any) -> Request:
    return tiny.ask(request_id, tiny.image(1), "Describe the image.", **{"max_tokens": 60, **params})


@pytest.fixture(scope="module")
def known(plain_engine: Engine) -> dict[str, list[int]]:
    """Return the first sixty tokens of the answer to every `long_request`."""
    answer = tiny.answers(plain_engine, [long_request()])["r"]
    return {f"r{i}": answer for i in range(20)} | {"r": answer}


# -- how an answer ends


def test_max_tokens_is_met_to_the_token(crowd: Engine, known: dict[str, list[int]]) -> None:
    """An accepted block may reach beyond max_tokens."""
    for seed in range(3):
        with_oracle(crowd, known, seed, truth=1.0)
        requests = [long_request(f"r{n}", max_tokens=n) for n in range(1, 14)]
        outputs = tiny.drain(crowd, requests)
        for n in range(1, 14):
            assert tiny.token_ids(outputs[f"r{n}"]) == known["r"][:n]
            last = outputs[f"r{n}"][-1]
            assert last.finish_reason == "length"
            assert last.stats is not None
            assert last.stats.completion_tokens == n


def test_eos_ends_an_answer_wherever_it_stands_in_a_block(
    crowd: Engine, known: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens accepted after EOS are dropped. EOS counts as a token and shows no text; ignore_eos continues."""
    answer = known["r"]
    for place in (0, 1, 5, 11):
        end = answer[place]
        place = answer.index(end)
        monkeypatch.setattr(crowd.target, "eos_ids", frozenset([end]))
        for seed in range(4):
            with_oracle(crowd, known, seed, truth=1.0)
            outputs = tiny.drain(crowd, [long_request("r0", ignore_eos=False), long_request("r1")])
            assert tiny.token_ids(outputs["r0"]) == answer[: place + 1]
            assert outputs["r0"][-1].finish_reason == "stop"
            assert outputs["r0"][-1].tokens[-1].text == ""
            assert tiny.token_ids(outputs["r1"]) == answer
            assert outputs["r1"][-1].finish_reason == "length"


def test_stop_strings_end_an_answer_at_their_first_letter(crowd: Engine, known: dict[str, list[int]]) -> None:
    """They start and end inside tokens and inside accepted blocks; tokens after the completing one are dropped."""
    with_oracle(crowd, known)
    whole = tiny.text_of(tiny.drain(crowd, [long_request("r")])["r"])
    crowd.pop_stats()
    for start, length in ((0, 1), (3, 4), (10, 7), (20, 2), (len(whole) // 2, 3)):
        stop = whole[start : start + length]
        for seed in range(3):
            with_oracle(crowd, known, seed, truth=0.95)
            outputs = tiny.drain(crowd, [long_request("r0", stop=("never said", stop)), long_request("r1")])
            assert tiny.text_of(outputs["r0"]) == whole[: whole.index(stop)]
            assert (outputs["r0"][-1].finish_reason, outputs["r0"][-1].stop_reason) == ("stop", stop)
            assert outputs["r1"][-1].stop_reason is None
            ids = tiny.token_ids(outputs["r0"])
            assert ids == known["r"][: len(ids)]
            shown = crowd.target.tokenizer.decode(ids, skip_special_tokens=True)
            assert stop in shown
            assert stop not in crowd.target.tokenizer.decode(ids[:-1], skip_special_tokens=True)
            assert tiny.text_of(outputs["r1"]) == whole


def test_text_of_an_answer_is_its_tokens_decoded(crowd: Engine, known: dict[str, list[int]]) -> None:
    with_oracle(crowd, known)
    outputs = tiny.drain(crowd, [long_request(f"r{i}") for i in range(5)])
    for each in outputs.values():
        decoded = crowd.target.tokenizer.decode(tiny.token_ids(each), skip_special_tokens=True)
        assert tiny.text_of(each) == decoded
        shown = "".join(t.text for output in each for t in output.tokens)
        assert decoded.startswith(shown), "tokens' own texts, but for an unfinished character at the end"


# -- what is refused


def test_what_cannot_fit_is_refused_with_the_figures(crowd: Engine) -> None:
    """If accepted, it would wait for room that never comes; it must not be dropped silently either."""
    with pytest.raises(RequestError, match="max_tokens is 250") as caught:
        crowd.add(long_request(max_tokens=250))
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    # litellm detects the case by the latter words, LangChain by the former, to fall back to a larger model.
    for known in ("prompt is too long", "this model's maximum context length is 256 tokens"):
        assert known in caught.value.message
    with pytest.raises(RequestError, match="256") as caught:
        crowd.add(tiny.ask("r", *(tiny.image(i) for i in range(16)), max_tokens=1))
    assert caught.value.param == "messages"
    tiny.assert_idle(crowd)


def test_what_just_fits_is_served(crowd: Engine) -> None:
    room = crowd.max_model_len - len(crowd.target.prompt(long_request().messages).ids)
    assert len(tiny.answers(crowd, [long_request(max_tokens=room)])["r"]) == room


def test_a_request_id_is_used_by_one_at_a_time(crowd: Engine) -> None:
    """Outputs are matched to requests by their id."""
    crowd.add(long_request())
    with pytest.raises(RequestError, match="already in use"):
        crowd.add(long_request())
    crowd.step()
    with pytest.raises(RequestError, match="already in use"):
        crowd.add(long_request())
    tiny.drain(crowd)
    tiny.drain(crowd, [long_request()])


# -- slots


def test_more_requests_than_slots_wait_their_turn(tiny_checkpoint: Path, known: dict[str, list[int]]) -> None:
    """First come, first served, and never more running than slots."""
    engine = Engine(tiny.config(tiny_checkpoint, max_num_seqs=2))
    for i in range(7):
        engine.add(long_request(f"r{i}", max_tokens=5 + i))
    finished = []
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                finished.append(output.request_id)
        engine.check_integrity()
        stats = engine.pop_stats()
        assert stats.running <= 2
        assert stats.running + stats.waiting == 7 - len(finished)
        assert stats.kv_cache_usage <= 1.0
    assert finished == [f"r{i}" for i in range(7)]
    tiny.assert_idle(engine)


def test_a_budget_in_bytes_limits_the_slots(tiny_checkpoint: Path, known: dict[str, list[int]]) -> None:
    """Memory is what was stated: the cache allocated is within the budget, and too small a budget says so at start."""
    each = 4 * 2 * 2 * 32 * (256 + 16) * 4  # layers, keys and values, heads, width, positions and margin, bytes
    engine = Engine(tiny.config(tiny_checkpoint, max_num_seqs=16, kv_cache_bytes=2 * each + each // 2))
    assert engine.info.max_num_seqs == engine.cache.num_slots == 2
    assert engine.cache.data.numel() * 4 <= 2 * each + each // 2
    answers = tiny.answers(engine, [long_request(f"r{i}") for i in range(5)])
    assert answers == {f"r{i}": known["r"] for i in range(5)}
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        Engine(tiny.config(tiny_checkpoint, kv_cache_bytes=each - 1))


def test_usage_counts_the_tokens_that_are_held(crowd: Engine) -> None:
    """The newest token is known but not computed yet, so it is not in the cache."""
    length = len(crowd.target.prompt(long_request().messages).ids)
    crowd.add(long_request())
    crowd.step()
    assert crowd.pop_stats().kv_cache_usage == 16 / (16 * 256)
    produced = 0
    while produced == 0:
        produced += sum(len(o.tokens) for o in crowd.step())
    while crowd.has_work:
        assert crowd.cache.usage == (length + produced - 1) / (16 * 256)
        produced += sum(len(o.tokens) for o in crowd.step())
    assert crowd.cache.usage == 0.0


# -- aborts and failures


def test_an_abort_at_any_moment_frees_everything(crowd: Engine, known: dict[str, list[int]]) -> None:
    """Waiting, with half a prompt and half a medium computed, or in the middle of its answer; the others go on."""
    for use_oracle in (False, True):
        for steps in range(9):
            if use_oracle:
                with_oracle(crowd, known, steps)
            for i in range(4):
                crowd.add(long_request(f"r{i}"))
            outputs: list[RequestOutput] = []
            for _ in range(steps):
                outputs += crowd.step()
                crowd.check_integrity()
            aborted = crowd.abort("r1")
            assert aborted is not None
            assert (aborted.request_id, aborted.finish_reason, aborted.tokens) == ("r1", "abort", ())
            assert aborted.stats is not None
            assert aborted.stats.completion_tokens == sum(len(o.tokens) for o in outputs if o.request_id == "r1")
            crowd.check_integrity()
            assert crowd.abort("r1") is None, "aborted twice is not an error, and has no second output"
            for request_id, late in tiny.drain(crowd).items():
                assert request_id != "r1"
                outputs += late
            for i in (0, 2, 3):
                assert [t.id for o in outputs if o.request_id == f"r{i}" for t in o.tokens] == known["r"]


@pytest.mark.parametrize("drafter", ["off", "flash"])
def test_a_request_that_overflows_leaves_nothing_to_the_next_in_its_slot(
    tiny_checkpoint: Path, tiny_draft: Path, drafter: str
) -> None:
    """torch adds -inf to masked scores, and a NaN left in the slot would stay NaN."""
    draft = None if drafter == "off" else str(tiny_draft)
    engine = Engine(tiny.config(tiny_checkpoint, drafter=drafter, draft=draft, dtype="float64", max_num_seqs=1))
    short, bad = tiny.ask("short", "How many?", max_tokens=8), tiny.ask("bad", "The fox jumps; where?", max_tokens=20)
    expected = tiny.answers(engine, [short])
    outlier = engine.target.tokenizer("jumps").input_ids[-1]
    target: Any = engine.target
    with torch.no_grad():
        target.model.get_input_embeddings().weight[outlier] = torch.inf
    engine.add(bad)
    engine.step()
    assert not engine.cache.data.isfinite().all()
    engine.abort("bad")
    assert tiny.answers(engine, [bad])["bad"]
    assert tiny.answers(engine, [short]) == expected
    caches = [engine.cache.data, *([engine.drafter.cache.data] if isinstance(engine.drafter, FlashDrafter) else [])]
    assert all(data.isfinite().all() for data in caches)


def test_an_abort_while_waiting_leaves_the_queue(tiny_checkpoint: Path) -> None:
    engine = Engine(tiny.config(tiny_checkpoint, max_num_seqs=1))
    for i in range(3):
        engine.add(long_request(f"r{i}", max_tokens=3))
    engine.step()
    output = engine.abort("r1")
    assert output is not None
    assert output.finish_reason == "abort"
    assert set(tiny.drain(engine)) == {"r0", "r2"}


def test_an_abort_of_nobody_is_nothing(crowd: Engine) -> None:
    assert crowd.abort("who?") is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("bad"), TypeError("dtype"), KeyError("x")])
def test_a_request_whose_media_cannot_be_encoded_fails_alone(
    crowd: Engine, known: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Any error is confined to it: other requests, and later ones in its slot, are not affected."""
    encode = crowd.target.encode
    poison = tiny.image(666)

    def encode_or_raise(medium: Medium, first: int, last: int) -> Tensor:
        if np.array_equal(medium.frames, poison.frames):
            raise error
        return encode(medium, first, last)

    monkeypatch.setattr(crowd.target, "encode", encode_or_raise)
    requests = [long_request("r0"), tiny.ask("bad", poison, tiny.image(1), "What?"), long_request("r1")]
    outputs = tiny.drain(crowd, requests)
    assert [(o.finish_reason, o.tokens) for o in outputs["bad"]] == [("error", ())]
    assert outputs["bad"][0].error is not None
    assert type(error).__name__ in outputs["bad"][0].error
    assert tiny.token_ids(outputs["r0"]) == tiny.token_ids(outputs["r1"]) == known["r"]


# -- who has the next pass


def test_those_that_decode_have_their_turn_within_a_chunk_of_any_prompt(crowd: Engine) -> None:
    """While a video of many chunks is prefilled, no stream waits for more than two chunks of it."""
    for name in ("r0", "r1"):
        crowd.add(long_request(name))
    while any(s.prefilling for s in crowd.scheduler.running) or crowd.scheduler.waiting:
        crowd.step()
    crowd.pop_stats()
    crowd.add(tiny.ask("long", tiny.video(1, 8), "What happens?", max_tokens=2))
    waited = [0]
    while (reading := crowd.scheduler.find("long")) is not None and (reading.slot is None or reading.prefilling):
        outputs = crowd.step()
        if {o.request_id for o in outputs} >= {"r0", "r1"}:
            waited.append(0)
        else:
            waited[-1] += crowd.pop_stats().prompt_tokens
    tiny.drain(crowd)
    assert len(waited) > 4, "it is many chunks long; how many are read at once depends on the time that steps take"
    assert max(waited) <= 2 * crowd.config.prefill_chunk


def test_a_video_is_encoded_only_as_far_as_its_prompt_is_read(crowd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding piece by piece gives the same features as encoding at once, and the cache then holds them."""
    crowd.media.cache = EncoderCache(1 << 20, "a test")
    encode, video = crowd.target.encode, tiny.video(4, 6)
    pieces: list[tuple[int, int]] = []

    def listen(medium: Medium, first: int, last: int) -> Tensor:
        pieces.append((first, last))
        return encode(medium, first, last)

    monkeypatch.setattr(crowd.target, "encode", listen)
    first = tiny.answers(crowd, [tiny.ask("a", video, "What happens?")])["a"]
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == 6
    assert max(end - begin for begin, end in pieces) <= 2
    kept = crowd.media.cache.get(crowd.media.cache.key(video))
    assert kept is not None
    assert torch.allclose(kept, encode(video, 0, 6), atol=1e-5)
    assert tiny.answers(crowd, [tiny.ask("b", video, "What happens?")])["b"] == first


def test_who_comes_while_a_prompt_is_read_joins_the_same_batch(tiny_checkpoint: Path) -> None:
    """With room left, a new request need not wait for another decode step."""
    engine = Engine(tiny.config(tiny_checkpoint, prefill_chunk=64, max_decode_slowdown=1e9, max_num_seqs=4))

    def who() -> list[str]:
        return [o.request_id for o in engine.step()]

    engine.add(tiny.ask("r0", "One."))
    assert [who(), who()] == [["r0"], ["r0"]]
    engine.add(tiny.ask("r1", "Two."))
    assert who() == ["r1"]
    engine.add(tiny.ask("r2", "Three."))
    assert who() == ["r2"]
    assert who() == ["r0", "r1", "r2"]
    tiny.drain(engine)


def test_media_that_no_image_library_reads_fail_alone(crowd: Engine, known: dict[str, list[int]]) -> None:
    """Use a real error, floats in place of bytes, and not a planted one."""
    bad = tiny.ask("bad", Medium("image", np.zeros((1, 32, 32, 3), np.float64)), "What?")
    outputs = tiny.drain(crowd, [bad, long_request("r0")])
    assert outputs["bad"][-1].finish_reason == "error"
    assert tiny.token_ids(outputs["r0"]) == known["r"]


# -- the encoder cache


def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Medium]:
    """Return a list that grows with each medium whose first piece passes through the tower."""
    seen: list[Medium] = []
    encode = engine.target.encode

    def listen(medium: Medium, first: int, last: int) -> Tensor:
        seen.extend([medium] if first == 0 else [])
        return encode(medium, first, last)

    monkeypatch.setattr(engine.target, "encode", listen)
    engine.media.cache = EncoderCache(engine.config.encoder_cache_bytes, "a test")
    return seen


def test_the_same_picture_is_encoded_once(crowd: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = encoded(crowd, monkeypatch)
    requests = [
        tiny.ask("a", tiny.image(1), "Describe."),
        tiny.ask("b", tiny.image(1), "How many?"),
        tiny.ask("c", tiny.image(2), tiny.image(1), "Which?"),
    ]
    first = tiny.answers(crowd, requests)
    stats = crowd.pop_stats()
    assert (len(seen), stats.encoder_cache_queries, stats.encoder_cache_hits) == (2, 4, 2)
    assert tiny.answers(crowd, requests) == first
    assert len(seen) == 2


def test_what_differs_in_kind_or_shape_alone_is_not_taken_for_the_same(
    crowd: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are equal; a key over bytes alone would answer with another medium's features."""
    seen = encoded(crowd, monkeypatch)
    two = tiny.picture(3, 2)
    media = [
        Medium("video", two),
        Medium("video", two.reshape(1, 64, 32, 3)),
        Medium("video", two.reshape(1, 32, 64, 3)),
        Medium("image", two.reshape(1, 64, 32, 3)),
    ]
    tiny.drain(crowd, [tiny.ask(str(i), m, "What?", max_tokens=2) for i, m in enumerate(media)])
    assert len(seen) == 4


def test_the_least_recently_used_features_go_first_and_the_budget_holds() -> None:
    """Without the budget a service that runs for a week runs out of memory."""
    cache = EncoderCache(3 * 40, "v")
    keys = [cache.key(tiny.image(i)) for i in range(5)]
    for key in keys[:3]:
        cache.put(key, torch.zeros(10))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], torch.zeros(10))
    assert [cache.get(k) is not None for k in keys] == [True, False, True, True, False]
    cache.put(keys[4], torch.zeros(31))
    assert cache.get(keys[4]) is None, "larger than the whole budget: not kept, and nothing thrown out for it"
    assert cache.get(keys[0]) is not None
    cache.put(keys[0], torch.zeros(10))
    cache.put(keys[4], torch.zeros(30))
    assert [cache.get(k) is not None for k in keys] == [False, False, False, False, True]


# -- what is counted


def totals(engine: Engine, requests: list[Request]) -> tuple[EngineStats, dict[str, list[RequestOutput]]]:
    engine.pop_stats()
    outputs = tiny.drain(engine, requests)
    return engine.pop_stats(), outputs


@pytest.mark.parametrize("seed", range(3))
def test_the_counts_agree_with_what_was_emitted(crowd: Engine, known: dict[str, list[int]], seed: int) -> None:
    """Acceptance counts follow the first-miss rule, include the bonus token, and count nothing twice."""
    with_oracle(crowd, known, seed)
    lengths = {f"r{i}": 3 * i + 1 for i in range(14)}
    stats, outputs = totals(crowd, [long_request(n, max_tokens=length) for n, length in lengths.items()])
    tokens = [t for each in outputs.values() for o in each for t in o.tokens]
    assert stats.generation_tokens == len(tokens) == sum(lengths.values())
    assert stats.prompt_tokens == 14 * len(crowd.target.prompt(long_request().messages).ids)
    assert stats.accepted_tokens == sum(t.source == "draft" for t in tokens)
    assert 0 < stats.accepted_tokens <= stats.draft_tokens
    assert stats.drafts == len(stats.acceptance_lengths)
    assert stats.drafts + stats.accepted_tokens == sum(stats.acceptance_lengths)
    # The first token comes from the prompt; a step whose tree was the root alone gives one token and is no draft.
    assert sum(stats.acceptance_lengths) <= len(tokens) - len(outputs)
    per_position = stats.accepted_per_position
    assert list(per_position) == sorted(per_position, reverse=True), "a position counted after a miss"
    assert sum(per_position) == stats.accepted_tokens
    assert per_position[0] <= stats.drafts
    for name in ("drafts", "draft_tokens", "accepted_tokens", "completion_tokens"):
        each = [getattr(o[-1].stats, name) for o in outputs.values()]
        assert sum(each) == getattr(stats, name.replace("completion", "generation"))


def test_steps_with_a_draft_account_for_every_token_but_the_first(crowd: Engine, known: dict[str, list[int]]) -> None:
    """With trees in every step: acceptance lengths sum to the tokens emitted after the first."""
    oracle = with_oracle(crowd, known, truth=1.0)
    oracle.rng.randint = lambda a, b: b  # type: ignore[method-assign]  # always as many nodes as it may
    stats, _ = totals(crowd, [long_request("r0", max_tokens=50)])
    remaining_one = 49 - sum(stats.acceptance_lengths)
    assert remaining_one in (0, 1), "the last token of all needs no draft"
    assert all(1 <= length <= crowd.config.nodes + 1 for length in stats.acceptance_lengths)
    assert stats.drafts + stats.accepted_tokens == sum(stats.acceptance_lengths), "also of the step that is cut short"


def test_without_a_draft_there_is_nothing_to_count(crowd: Engine) -> None:
    requests = [Request("r", long_request().messages, long_request().params, speculation=False)]
    stats, outputs = totals(crowd, requests)
    assert (stats.drafts, stats.draft_tokens, stats.accepted_tokens) == (0, 0, 0)
    assert stats.acceptance_lengths == stats.accepted_per_position == ()
    assert all(t.source == "target" for o in outputs["r"] for t in o.tokens)


def test_counts_are_taken_once_and_steps_are_timed(crowd: Engine) -> None:
    """A counter that could be read twice would be added twice to the metrics."""
    crowd.media.cache = EncoderCache(1 << 20, "a test")
    stats, outputs = totals(crowd, [long_request()])
    assert {phase for phase, _ in stats.step_seconds} == {"vision", "prefill", "draft", "verify"}
    assert all(seconds > 0 for _, seconds in stats.step_seconds)
    assert set(stats.batch_sizes) == {1}
    assert len(stats.step_tokens) > len(stats.batch_sizes), "steps that prefill count too"
    assert sum(stats.step_tokens) == stats.prompt_tokens + stats.generation_tokens
    assert all(1 <= tokens <= crowd.config.nodes + 1 for tokens in stats.step_tokens[1 - len(stats.batch_sizes) :])
    again = crowd.pop_stats()
    assert again == EngineStats(running=0, waiting=0, kv_cache_usage=0.0)
    last = outputs["r"][-1].stats
    assert last is not None
    assert 0 <= last.queue <= last.time_to_first_token
    assert last.decode > 0


def test_a_request_that_asks_for_it_hears_with_every_output_what_it_has_cost(crowd: Engine) -> None:
    requests = [replace(long_request("told"), running_stats=True), long_request("r1")]
    outputs = tiny.drain(crowd, requests)
    said = 0
    for output in outputs["told"]:
        assert output.stats is not None
        said += len(output.tokens)
        assert output.stats.completion_tokens == said
    last, silent = outputs["told"][-1].stats, outputs["r1"][-1].stats
    assert last is not None
    assert silent is not None
    assert last.prompt_tokens == silent.prompt_tokens
    assert [o.stats for o in outputs["r1"][:-1]] == [None] * (len(outputs["r1"]) - 1)


def test_info_tells_what_was_loaded(crowd: Engine, tiny_checkpoint: Path) -> None:
    info = crowd.info
    assert (info.model, info.device, info.dtype, info.drafter) == (str(tiny_checkpoint), "cpu", "float32", "flash")
    assert (info.max_model_len, info.max_num_seqs, info.tokens_per_image) == (256, 16, 16)
    assert info.geometry.exact == (32, 32)
