"""Test logits processors: as transformers computes them, and the same along every path of a tree.

Other engines ignore such options under speculation, or apply them to the wrong row. So every result is compared with
decoding one token at a time.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from model.decoding import tree
from model.decoding.detokenize import Vocabulary
from model.decoding.processors import process
from model.decoding.sampling import likeliest_of
from model.engine.engine import Engine
from model.request import Message, Request, RequestError, RequestOutput, SamplingParams, TokenLogprobs
from tests.model import tiny, tiny_qwen
from tests.model.oracle import with_oracle
from tests.model.test_equality import CONTENTS

VOCAB = 40
ENDS = frozenset({3, 17})
PROMPT = (5, 6, 7, 7, 30)
ANSWER = (8, 9, 9, 6, 9)
EVERY: dict[str, Any] = {
    "min_tokens": 7,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.3,
    "repetition_penalty": 1.3,
    "logit_bias": ((4, 5.0), (9, -100.0), (30, 0.25)),
}


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def processed(given: Tensor, paths: list[list[int]], answer: tuple[int, ...] = ANSWER, **params: Any) -> Tensor:
    settings = SamplingParams(**params)
    return process(given, settings, prompt=PROMPT, answer=answer, paths=paths, ends=ENDS)


# -- one row


@pytest.mark.parametrize("answer", [(), ANSWER, ANSWER * 3])
def test_bias_repetition_and_length_are_transformers_own(answer: tuple[int, ...]) -> None:
    given, bias = logits(1), {(4,): 5.0, (9,): -100.0}
    theirs = LogitsProcessorList([
        SequenceBiasLogitsProcessor(sequence_bias=bias),
        RepetitionPenaltyLogitsProcessor(1.3),
        MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, sorted(ENDS), device="cpu"),
    ])  # fmt: skip
    expected = theirs(torch.tensor([[*PROMPT, *answer]]), given.clone())
    ours = {"repetition_penalty": 1.3, "min_tokens": 6, "logit_bias": ((4, 5.0), (9, -100.0))}
    assert torch.equal(processed(given, [[]], answer, **ours), expected)


def test_presence_and_frequency_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the answer and not the prompt."""
    given = logits(1)
    expected = given.clone()
    for token in range(VOCAB):
        count = ANSWER.count(token)
        expected[0, token] -= 0.5 * count + 0.7 * (count > 0)
    ours = processed(given, [[]], presence_penalty=0.7, frequency_penalty=0.5)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_what_asks_for_nothing_changes_nothing_and_the_given_logits_stay() -> None:
    given = logits(2)
    before = given.clone()
    assert torch.equal(processed(given, [[], [1]]), given)
    processed(given, [[], [1]], **EVERY | {"max_tokens": 9})
    assert torch.equal(given, before)


def test_an_answer_that_ignores_its_end_may_have_one_early() -> None:
    given = logits(1)
    assert torch.equal(processed(given, [[]], min_tokens=9, max_tokens=9, ignore_eos=True), given)


# -- rows of a tree


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_a_tree_is_what_it_would_be_without_a_draft(seed: int) -> None:
    rng = random.Random(seed)
    paths: list[list[int]] = [[]]
    for _ in range(11):
        paths.append([*rng.choice(paths), rng.randrange(VOCAB)])
    given = logits(len(paths), seed)
    together = processed(given, paths, **EVERY)
    for row, path in enumerate(paths):
        alone = processed(given[row : row + 1], [[]], (*ANSWER, *path), **EVERY)
        assert torch.equal(together[row : row + 1], alone), path


def test_paths_of_a_tree() -> None:
    trees = tree.roots(np.array([1, 2]), 4)
    trees.tokens[0], trees.parents[0], trees.sizes[0] = [1, 10, 11, 12], [-1, 0, 1, 0], 4
    assert trees.paths(0) == [[], [10], [10, 11], [12]]
    assert trees.paths(1) == [[]]


# -- whole answers

ASKED: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.2, "presence_penalty": 0.5, "temperature": 0.8, "seed": 4},
    {"presence_penalty": -1.5, "temperature": 1.0, "top_p": 0.9, "seed": 5},
    {"min_tokens": 20, "ignore_eos": False, "logit_bias": ((2, 30.0),)},
    {"logit_bias": ((20, 40.0), (21, 39.5)), "temperature": 1.0, "top_k": 9, "seed": 6},
    {},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.4, "temperature": 0.7, "min_p": 0.05, "seed": 7},
)


def asked(number: int = 14) -> list[Request]:
    contents = list(CONTENTS.values())
    return [
        tiny.ask(f"r{i}", *contents[i % len(contents)], **{"max_tokens": 28, "logprobs": i % 4} | ASKED[i % len(ASKED)])
        for i in range(number)
    ]


def heard(outputs: dict[str, list[RequestOutput]]) -> dict[str, tuple[list[int], list[TokenLogprobs]]]:
    return {
        name: (tiny.token_ids(said), [one for output in said for one in output.logprobs or ()])
        for name, said in outputs.items()
    }


@pytest.fixture(scope="module")
def expected(plain_engine: Engine) -> dict[str, tuple[list[int], list[TokenLogprobs]]]:
    """Answer one request at a time, without a draft."""
    return {r.request_id: heard(tiny.drain(plain_engine, [r]))[r.request_id] for r in asked()}


def test_options_have_an_effect(
    expected: dict[str, tuple[list[int], list[TokenLogprobs]]], plain_engine: Engine
) -> None:
    """Without an effect all tests below would pass for ignored options."""
    neutral = {name: getattr(SamplingParams(), name) for name in EVERY}
    without = [replace(r, params=replace(r.params, **neutral)) for r in asked()]
    plain = {r.request_id: tiny.answers(plain_engine, [r])[r.request_id] for r in without}
    changed = [r.request_id for r in asked() if plain[r.request_id] != expected[r.request_id][0]]
    assert changed == [r.request_id for r in asked() if r.params.processes]


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("oracle", [False, True], ids=["untrained", "oracle"])
def test_tokens_and_log_probabilities_are_the_same_with_a_draft_and_in_a_crowd(
    crowd: Engine, expected: dict[str, tuple[list[int], list[TokenLogprobs]]], oracle: bool, every: int
) -> None:
    if oracle:
        with_oracle(crowd, {name: ids for name, (ids, _) in expected.items()}, seed=every)
    found = heard(tiny.drain(crowd, asked(), every=every))
    assert {name: ids for name, (ids, _) in found.items()} == {name: ids for name, (ids, _) in expected.items()}
    for name, (_, told) in found.items():
        assert_alike(told, expected[name][1])
    stats = crowd.pop_stats()
    assert stats.accepted_tokens > 100 if oracle else stats.draft_tokens > 100


def assert_alike(one: list[TokenLogprobs], other: list[TokenLogprobs]) -> None:
    """Compare up to a float32 tolerance: in torch a row's bits depend on its batch."""
    assert [told.chosen.id for told in one] == [told.chosen.id for told in other]
    for told, like in zip(one, other, strict=True):
        numbers = [
            (a.logprob, b.logprob) for a, b in zip((told.chosen, *told.top), (like.chosen, *like.top), strict=True)
        ]
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in numbers)


def test_a_penalised_greedy_answer_is_transformers_own(tiny_checkpoint: Path, crowd: Engine) -> None:
    """The repetition penalty counts prompt tokens, those of an image included; EOS does not come too early."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    text = "Say what you see, and say it again."
    inputs = tiny.by_processor(processor, (Message("user", (text,)),), return_tensors="pt")
    bias = {(token,): value for token, value in ((20, 4.0), (21, -50.0), (2, 60.0))}
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=30,
            min_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.4,
            sequence_bias=bias,
        )
    theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
    params: dict[str, Any] = {"max_tokens": 30, "min_tokens": 12, "repetition_penalty": 1.4, "ignore_eos": False}
    params["logit_bias"] = tuple((token, value) for (token,), value in bias.items())
    assert tiny.answers(crowd, [tiny.ask("r", text, **params)])["r"] == theirs
    assert len(theirs) == 13, "the end, which is made likely, comes as soon as it may"


def test_neither_an_end_nor_a_stop_string_comes_before_the_shortest_length(plain_engine: Engine) -> None:
    ask = tiny.ask("r", *CONTENTS["image"], max_tokens=24)
    (outputs,) = tiny.drain(plain_engine, [ask]).values()
    tokens = [token for output in outputs for token in output.tokens]
    letter = next(token.text[0] for token in tokens if token.text.strip())
    stopped = replace(ask, params=replace(ask.params, stop=(letter,)))
    assert len(tiny.answers(plain_engine, [stopped])["r"]) < 12
    late = replace(ask, params=replace(ask.params, stop=(letter,), min_tokens=12))
    (outputs,) = tiny.drain(plain_engine, [late]).values()
    assert tiny.text_of(outputs).startswith("".join(token.text for token in tokens[:12]))
    assert len(tiny.token_ids(outputs)) >= 12


# -- log-probabilities


def test_log_probabilities_are_of_the_targets_own_distribution(tiny_checkpoint: Path, crowd: Engine) -> None:
    """Compare with transformers' logits over the whole text, before a request's options change them."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    ask = tiny.ask("r", "What is this?", max_tokens=20, logprobs=3, temperature=1.0, seed=3, repetition_penalty=1.5)
    (outputs,) = tiny.drain(crowd, [ask]).values()
    answer = tiny.token_ids(outputs)
    prompt = tiny.by_processor(processor, ask.messages, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        all_logits = model(input_ids=torch.cat((prompt, torch.tensor([answer])), 1)).logits[0, prompt.shape[1] - 1 : -1]
    logs = all_logits.double().log_softmax(-1)
    told = [one for output in outputs for one in output.logprobs or ()]
    for row, (token, one) in enumerate(zip(answer, told, strict=True)):
        assert one.chosen.id == token
        assert one.chosen.logprob == pytest.approx(logs[row, token].item(), abs=1e-4)
        best = logs[row].topk(3)
        assert [top.logprob for top in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(len(output.tokens) == len(output.logprobs or ()) for output in outputs if output.tokens)


def test_of_equals_the_lowest_ids_are_told_first() -> None:
    given = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 5.0]], dtype=torch.bfloat16)
    (own, best), (other, none) = likeliest_of(given, [3, 4], 2)
    assert [token for token, _ in best] == [1, 2]
    assert [token for token, _ in none] == [4, 0]
    assert own == pytest.approx(given[0].double().log_softmax(-1)[3].item())
    assert other == pytest.approx(none[0][1])
    assert [best for _, best in likeliest_of(given, [3, 4], 0)] == [[], []]
    assert len(likeliest_of(given, [3, 4], 99)[0][1]) == 5


@pytest.mark.parametrize("folder", ["tiny_checkpoint", "qwen_checkpoint"])
def test_bytes_of_tokens_side_by_side_are_the_text(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    vocabulary = Vocabulary(tokenizer)
    text = "Größe: 東京 🙂\n\tthe red  ring"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(vocabulary.bytes_of, ids)) == text.encode()
    assert vocabulary.bytes_of(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    assert vocabulary.bytes_of(10**9) == b""


# -- what cannot be


@pytest.mark.parametrize(
    "field",
    [
        *(
            {"min_tokens": -1},
            {"min_tokens": 17, "max_tokens": 16},
            {"presence_penalty": 2.1},
            {"frequency_penalty": -3.0},
        ),
        *(
            {"repetition_penalty": 0.0},
            {"repetition_penalty": float("nan")},
            {"logit_bias": ((1, 101.0),)},
            {"logprobs": -1},
        ),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**field)
    assert refused.value.param == next(iter(field))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_bias_for_what_is_no_token_is_refused(crowd: Engine, token: int) -> None:
    with pytest.raises(RequestError) as refused:
        crowd.add(tiny.ask("r", "Hi", logit_bias=((token, 1.0),)))
    assert refused.value.param == "logit_bias"


def test_a_length_that_nobody_asked_for_is_lowered_to_what_fits(plain_engine: Engine) -> None:
    ask = tiny.ask("r", "Hi", max_tokens=plain_engine.max_model_len)
    with pytest.raises(RequestError) as refused:
        plain_engine.add(ask)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")
    room = plain_engine.prepare(replace(ask, clamp_max_tokens=True)).request.params.max_tokens
    assert room == plain_engine.max_model_len - len(
        plain_engine.prepare(replace(ask, clamp_max_tokens=True)).prompt.ids
    )
    assert len(tiny.answers(plain_engine, [replace(ask, clamp_max_tokens=True)])["r"]) == room
    with pytest.raises(RequestError) as full:
        plain_engine.prepare(replace(tiny.ask("r", "word " * 500), clamp_max_tokens=True))
    assert full.value.param == "messages"


def test_qwen_too(qwen_plain: Engine, qwen_crowd: Engine) -> None:
    content = (tiny_qwen.image(1), "Describe it.")
    asks = [tiny.ask(f"q{i}", *content, **{"max_tokens": 20, "logprobs": 1} | params) for i, params in enumerate(ASKED)]
    alone = {ask.request_id: heard(tiny.drain(qwen_plain, [ask]))[ask.request_id] for ask in asks}
    with_oracle(qwen_crowd, {name: ids for name, (ids, _) in alone.items()}, seed=1)
    together = heard(tiny.drain(qwen_crowd, asks))
    for name, (ids, told) in together.items():
        assert ids == alone[name][0]
        assert_alike(told, alone[name][1])
