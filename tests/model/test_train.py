"""Test training a draft of any kind: it learns, it resumes exactly, and serving gets what it learnt."""

from __future__ import annotations

import gc
import json
import math
import random
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import TRAINED
from model.drafters import checkpoint, presets
from model.drafters.flash.network import DraftNetwork
from model.engine.engine import Engine
from model.request import Grammar, Medium, Message, Request, SamplingParams
from model.targets.base import Target
from model.train import loss as taught
from model.train.data import Example, frequent, read_answers, write_answers
from model.train.loss import Anchors, Learner, block_loss, draft_loss
from model.train.seen import Memory, allowed_tokens, capture, grammars_of
from model.train.trainer import TrainConfig, train
from tests.model import tiny

QUESTIONS = ("Describe the image.", "How many objects are there?", "What do you see?")


def messages(number: int) -> tuple[Message, ...]:
    medium = tiny.image(number) if number % 2 else tiny.video(number, 2)
    return (Message("user", (medium, QUESTIONS[number % 3])),)


def group(number: int) -> object:
    return number % 2


@pytest.fixture(scope="module")
def examples(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Let the tiny target answer six prompts."""
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=6))
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    return write_answers(engine, messages, range(6), file, temperatures=(0.0,), max_tokens=30)


def losses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows with the loss of each step."""
    seen: list[float] = []

    def listen(*args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, hits = block_loss(*args, **named)
        seen.append(loss.item())
        return loss, hits

    monkeypatch.setattr(taught, "block_loss", listen)
    return seen


def settings(steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        **{"steps": steps, "batch": 3, "anchors": 8, "warmup": 5, "rate": 5e-3, "autocast": False, **more}
    )


def fresh(target: Target) -> DraftNetwork:
    return tiny.new_draft(target).train()


# -- training


@pytest.mark.parametrize("vocabulary", [0, 200], ids=["all tokens", "the frequent ones"])
def test_a_trained_draft_is_accepted_when_it_is_served(
    vocabulary: int,
    tiny_checkpoint: Path,
    tiny_target: Target,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run answers, training, checkpoint and engine. The prompts are those of the training, so memorising suffices."""
    told = losses_of(monkeypatch)
    network = tiny.new_draft(tiny_target, vocabulary=vocabulary).train()
    if network.offered is not None:
        network.offered.copy_(torch.tensor(frequent(examples, vocabulary, tiny_target.eos_ids)))
    train(tiny_target, network, examples, messages, settings(160), tmp_path / "draft.pt", group)
    assert sum(told[-10:]) < 0.5 * sum(told[:10])
    checkpoint.save(tmp_path / "draft", network, tiny_target)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tmp_path / "draft"), max_num_seqs=6, prefill_chunk=20))
    params = SamplingParams(max_tokens=30)
    answers = tiny.answers(engine, [Request(str(e.number), messages(e.number), params) for e in examples])
    assert answers == {str(e.number): list(e.answer) for e in examples}
    lengths = engine.pop_stats().acceptance_lengths
    assert sum(lengths) / len(lengths) > 2.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_reaches_every_weight_of_the_draft(
    name: str, tiny_checkpoint: Path, examples: list[Example], dtype: str
) -> None:
    """Packed weights pass no gradient: through a packed lm_head a draft would silently learn nothing."""
    target = tiny.target_for(name, tiny_checkpoint, dtype=dtype)
    network = tiny.new_network(name, target).float().train()
    prompts = [target.prompt(messages(e.number)) for e in examples[:2]]
    with torch.no_grad():
        seen = capture(target, prompts, [e.answer for e in examples[:2]], network)
    loss, hits = draft_loss(Learner(target, network), seen, anchors=8, gamma=5.0, rng=random.Random(0))
    assert hits.shape == (network.config.block,)
    loss.backward()
    for weight_name, weight in network.named_parameters():
        assert weight.grad is not None, weight_name
        assert weight.grad.abs().sum() > 0, weight_name


@pytest.mark.parametrize("name", TRAINED)
def test_every_kind_of_draft_learns_what_it_is_then_accepted_for(
    name: str, tiny_checkpoint: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps lower its loss, on the same examples and places as for every other drafter."""
    told = losses_of(monkeypatch)
    target = tiny.target_for(name, tiny_checkpoint)
    torch.manual_seed(0)
    network = presets.new(name, target, hidden_size=64)
    train(target, network, examples, messages, settings(60, rate=1e-2), tmp_path / "draft.pt", group)
    assert sum(told[-8:]) < 0.75 * sum(told[:8])
    checkpoint.save(tmp_path / "draft", network, target, drafter=name)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tmp_path / "draft"), max_num_seqs=6, prefill_chunk=20))
    assert engine.info.drafter == name
    params = SamplingParams(max_tokens=30)
    answers = tiny.answers(engine, [Request(str(e.number), messages(e.number), params) for e in examples])
    assert answers == {str(e.number): list(e.answer) for e in examples}
    lengths = engine.pop_stats().acceptance_lengths
    assert sum(lengths) / len(lengths) > 1.15


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_that_was_killed_ends_where_it_would_have_ended(
    name: str, tiny_checkpoint: Path, examples: list[Example], tmp_path: Path
) -> None:
    """Bit for bit: batches, rates and anchors follow from the step alone, and the optimiser's state is kept."""
    target = tiny.target_for(name, tiny_checkpoint)
    whole = tiny.new_network(name, target).train()
    train(target, whole, examples, messages, settings(12), tmp_path / "whole.pt", group)

    calls = 0
    config = settings(12, save_every=0.0, memory_bytes=0)  # so that each example is captured again each time
    for kill_after in (10, 16):  # in the middle of a step; a step has three prompts

        def killed(number: int, kill_after: int = kill_after) -> tuple[Message, ...]:
            nonlocal calls
            calls += 1
            if calls > kill_after:
                raise KeyboardInterrupt
            return messages(number)

        calls = 0
        begun = tiny.new_network(name, target).train()
        with pytest.raises(KeyboardInterrupt):
            train(target, begun, examples, killed, config, tmp_path / "killed.pt", group)
    resumed = tiny.new_network(name, target).train()
    with torch.no_grad():
        for weight in resumed.parameters():
            weight.add_(1.0)  # what was in memory is lost
    train(target, resumed, examples, messages, config, tmp_path / "killed.pt", group)
    for weight_name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[weight_name]), weight_name
    assert not list(tmp_path.glob("*.tmp")), "saved beside and moved into place"


def test_all_kinds_of_draft_learn_from_the_same_places(tiny_target: Target, examples: list[Example]) -> None:
    """Otherwise a comparison of drafters would compare luck or data."""
    prompts = [tiny_target.prompt(messages(e.number)) for e in examples[:2]]
    with torch.no_grad():
        seen = capture(tiny_target, prompts, [e.answer for e in examples[:2]], fresh(tiny_target))
    short, long = (Anchors.of(seen, block, 9, random.Random(4)) for block in (3, 7))
    assert torch.equal(short.places, long.places)
    assert torch.equal(short.labels, long.labels[:, :3])
    assert torch.equal(short.taught, long.taught[:, :3])
    assert torch.equal(long.previous[:, 1:], long.labels[:, :-1].clamp_min(0))


def test_hidden_states_are_kept_without_the_pixels_they_came_from(tiny_target: Target, examples: list[Example]) -> None:
    """Pixels of long videos would take more memory than the states, outside of the budget."""
    pixels = list[weakref.ref[Any]]()

    def asked(number: int) -> tuple[Message, ...]:
        (message,) = messages(number)
        pixels.extend(weakref.ref(part.frames) for part in message.content if isinstance(part, Medium))
        return (message,)

    memory = Memory(1 << 30)
    for _ in range(2):
        seen = memory.seen(tiny_target, examples[:4], asked, fresh(tiny_target))
        assert len(pixels) == 4, "they are looked at once"
    gc.collect()
    assert all(each() is None for each in pixels)
    assert all(each.prompt.spans for each in seen)


def test_a_finished_training_is_not_done_again(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = fresh(tiny_target)
    train(tiny_target, network, examples, messages, settings(2), tmp_path / "draft.pt", group)
    told = losses_of(monkeypatch)
    again = fresh(tiny_target)
    train(tiny_target, again, examples, messages, settings(2), tmp_path / "draft.pt", group)
    assert told == []
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_the_target_stays_as_it_is(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Its embeddings and lm_head are frozen: training a draft must not change the model."""
    model: torch.nn.Module = tiny_target.model  # type: ignore[attr-defined]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train(tiny_target, fresh(tiny_target), examples, messages, settings(3), tmp_path / "draft.pt", group)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None


def test_batches_are_of_one_group(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """A batch of images beside videos would be mostly padding."""
    seen: list[int] = []

    def listening(number: int) -> tuple[Message, ...]:
        seen.append(number)
        return messages(number)

    train(tiny_target, fresh(tiny_target), examples, listening, settings(8), tmp_path / "draft.pt", group)
    batches = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all(len({group(n) for n in batch}) == 1 for batch in batches)
    assert {group(n) for n in seen} == {0, 1}


# -- the loss


def test_the_loss_is_nought_for_a_draft_that_is_sure_of_the_right_token() -> None:
    labels = torch.tensor([[1, 2], [0, -100]])
    sure = torch.nn.functional.one_hot(labels.clamp_min(0), 4) * 100.0
    loss, hits = block_loss(sure, sure.log_softmax(-1), labels, gamma=5.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert hits.tolist() == [1.0, 1.0]


def test_later_positions_weigh_less_and_missing_ones_nothing() -> None:
    """w_j = exp(-(j - 1) / gamma): a token is useful only if all before it were accepted."""
    torch.manual_seed(0)
    drafted, taught = torch.randn(2, 3, 5), torch.randn(2, 3, 5).log_softmax(-1)
    labels = torch.tensor([[1, 2, 3], [4, 0, -100]])
    loss, _ = block_loss(drafted, taught, labels, gamma=2.0)
    total = weights = 0.0
    for b in range(2):
        for j in range(3):
            if labels[b, j] == -100:
                continue
            p, q = drafted[b, j].softmax(-1), taught[b, j].exp()
            weight = math.exp(-j / 2.0)
            total += weight * (-math.log(p[labels[b, j]].item()) + (p - q).abs().sum().item())
            weights += weight
    assert loss.item() == pytest.approx(total / weights, rel=1e-5)
    changed = drafted.clone()
    changed[1, 2] += 7.0 * torch.randn(5)
    assert block_loss(changed, taught, labels, gamma=2.0)[0].item() == pytest.approx(loss.item())


# -- the answers it learns from


def test_answers_are_the_targets_own_and_written_once(
    tiny_checkpoint: Path, plain_engine: Engine, examples: list[Example], tmp_path: Path
) -> None:
    for example in examples[:2]:
        request = Request("x", messages(example.number), SamplingParams(max_tokens=30))
        assert tiny.answers(plain_engine, [request])["x"] == list(example.answer)
    file = tmp_path / "answers.jsonl"
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=2))
    first = write_answers(engine, messages, range(3), file, max_tokens=5)
    text = file.read_text()
    assert read_answers(file) == first
    more = write_answers(engine, messages, range(5), file, max_tokens=5)
    assert more[:3] == first
    assert file.read_text().startswith(text)
    assert [e.number for e in read_answers(file)] == [e.number for e in more] == list(range(5))


def test_an_answer_half_written_when_the_run_was_killed_is_written_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Appended to the incomplete line, the next one would be lost as well, or make the file unreadable."""
    file = tmp_path / "answers.jsonl"
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=1))
    whole = write_answers(engine, messages, range(3), file, max_tokens=5)
    lines = file.read_text()
    for torn in (lines[:-1], lines[:-2], lines[:-9], lines[: lines.rindex("{") + 1]):
        file.write_text(torn)
        assert write_answers(engine, messages, range(4), file, max_tokens=5)[:3] == whole
        assert [e.number for e in read_answers(file)] == [0, 1, 2, 3]
        assert all(json.loads(line) for line in file.read_text().splitlines() if line.endswith("}"))


def test_only_what_was_asked_for_is_returned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A smaller run over the same file must not train on more than it says it does."""
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=4))
    write_answers(engine, messages, range(4), tmp_path / "a.jsonl", max_tokens=5)
    assert [e.number for e in write_answers(engine, messages, range(2), tmp_path / "a.jsonl", max_tokens=5)] == [0, 1]


# -- answers that follow a grammar


DIGITS = Grammar("regex", "[0-9]{5}x[0-9]{3}")


def test_a_draft_is_taught_what_the_grammar_left_of_the_targets_choice(
    tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path
) -> None:
    """An answer under a grammar is chosen among few tokens, and its draft is judged by the same choice."""
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=2))
    only = {0: DIGITS}
    wrote = write_answers(engine, messages, range(2), tmp_path / "a.jsonl", grammar=only.get, temperatures=(0.0,))
    assert re.fullmatch("[0-9]{5}x[0-9]{3}", engine.target.tokenizer.decode(wrote[0].answer, skip_special_tokens=True))
    bound, free = replace(wrote[0], grammar=DIGITS), wrote[1]
    allowed = allowed_tokens(bound, grammars_of(tiny_target), tiny_target.vocab_size)
    assert allowed is not None
    assert allowed_tokens(free, grammars_of(tiny_target), tiny_target.vocab_size) is None
    assert all(row[token] for row, token in zip(allowed, bound.answer, strict=False))
    one, other = Memory(1 << 30).seen(tiny_target, [bound, free], messages, fresh(tiny_target))
    for row, token, may in zip(one.taught, bound.answer, allowed, strict=False):
        assert row.argmax() == token, "the likeliest allowed token, which a greedy answer has"
        assert row.exp()[~may].sum() == 0.0
        assert row.float().exp().sum().item() == pytest.approx(1.0, abs=0.02)
    x = len("00000")
    assert one.taught[x].exp().max() == 1.0, "what must come is certain"
    assert torch.isfinite(other.taught).all(), "free text may be anything"
    assert [*one.chosen[: len(bound.answer)]] == [True] * 5 + [False] + [True] * 3 + [False], "nor must a draft find it"
    assert other.chosen.all()
    loss, _ = draft_loss(
        Learner(tiny_target, fresh(tiny_target)), [one, other], anchors=4, gamma=5.0, rng=random.Random(0)
    )
    assert torch.isfinite(loss)
