"""Test a whole training: its draft is served, it resumes only with the same settings, and processes act as one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.drafters.flash.network import DraftConfig
from model.drafters.presets import Sizes, width
from model.engine.engine import Engine
from model.errors import ConfigError
from model.request import Grammar, Message, Request, SamplingParams
from model.targets.base import Target
from model.train import plots
from model.train.data import Example, Interrupted, Unusable, frequent, read_answers
from model.train.interrupt import on_signals
from model.train.measure import Acceptance, acceptance
from model.train.run import Settings, anchors, run, spread
from model.train.team import Alone, gather
from model.train.trainer import TrainConfig
from tests.model import tiny

BAD = 3


@dataclass(frozen=True)
class Tiny:
    """Offer data of eight prompts, one of which cannot be used."""

    digest: str = "tiny"
    summary: str = "eight pictures"
    train: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    held_out: tuple[int, ...] = (6, 7)
    grammars: Mapping[int, Grammar] = field(default_factory=dict)

    def grammar(self, number: int) -> Grammar | None:
        return self.grammars.get(number)

    def messages(self, number: int) -> tuple[Message, ...]:
        if number == BAD:
            raise Unusable("data.jsonl:4: broken")
        medium = tiny.image(number) if number % 2 else tiny.video(number, 2)
        return (Message("user", (medium, "Describe it.")),)

    def kind(self, number: int) -> str:
        return "image" if number % 2 else "video"


def settings(model: Path, output: Path, **more: Any) -> Settings:
    config = {"steps": 6, "batch": 2, "anchors": 4, "warmup": 2, "rate": 5e-3, "autocast": False}
    config |= {name: more.pop(name) for name in list(more) if name in TrainConfig.__dataclass_fields__}
    target = tiny.config(model, drafter="off", max_num_seqs=4).resolved()
    given: dict[str, Any] = {"drafter": "flash", "sizes": Sizes(num_latents=4, block=4), "max_tokens": 20, **more}
    return Settings(target=target, output=output, command="a test", train=TrainConfig(**config), **given)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_draft_is_served_and_its_card_tells_what_it_is(
    tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path
) -> None:
    figures = run(settings(tiny_checkpoint, tmp_path, evaluate_every=3), tiny_target, Tiny(), Alone())
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["acceptance_length"] == {kind: each["length"] for kind, each in figures.items()}
    assert figures.keys() == {"all", "image", "video"}
    assert figures["all"]["prompts"] == 2
    assert told["examples"] == 5
    card = (tmp_path / "README.md").read_text()
    for text in (f"| all | {figures['all']['length']:.2f} |", told["target_fingerprint"][:16], "eight pictures"):
        assert text in card
    assert "data.jsonl:4: broken" in card, "what was left out is told"
    known = {plots.LOSS, plots.ACCEPTANCE, plots.POSITIONS, plots.CALIBRATION}
    pictures = known & {path.name for path in tmp_path.iterdir()}
    assert pictures >= {plots.LOSS, plots.ACCEPTANCE, plots.CALIBRATION}
    assert f"off by\n{told['miscalibration']:.3f} on average" in card
    assert all(name in card for name in pictures)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in log if "acceptance" in row] == [3, 6]
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tmp_path), max_num_seqs=2))
    assert engine.info.drafter == "flash"
    requests = [Request(str(n), Tiny().messages(n), SamplingParams(max_tokens=20)) for n in (0, 6)]
    plain = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=2))
    assert tiny.answers(engine, requests) == tiny.answers(plain, requests)
    assert engine.pop_stats().drafts > 0


def test_a_draft_may_propose_what_answers_have_most_often(
    tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path
) -> None:
    few = settings(tiny_checkpoint, tmp_path, sizes=Sizes(num_latents=4, block=4, vocabulary=80))
    run(few, tiny_target, Tiny(), Alone())
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["draft"]["vocabulary"] == 80
    assert "vocabulary 80" in (tmp_path / "README.md").read_text()
    answers = read_answers(tmp_path / "run" / "answers.jsonl")
    offered = load_file(tmp_path / "model.safetensors")["offered"].tolist()
    assert offered == frequent(answers, 80, tiny_target.eos_ids)
    said = {token for each in answers for token in each.answer}
    assert said | tiny_target.eos_ids <= set(offered) or len(said) > 70
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tmp_path), max_num_seqs=2))
    requests = [Request(str(n), Tiny().messages(n), SamplingParams(max_tokens=20)) for n in (0, 6)]
    plain = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=2))
    assert tiny.answers(engine, requests) == tiny.answers(plain, requests)


def test_the_most_frequent_tokens_and_no_others() -> None:
    examples = [Example(0, (7, 9, 7, 300)), Example(1, (9, 7, 5))]
    assert frequent(examples, 3, {2}) == [2, 7, 9]
    assert frequent(examples, 4, {2}) == [2, 5, 7, 9], "of those as frequent as others the lowest"
    assert frequent(examples, 8, {2}) == [0, 1, 2, 3, 5, 7, 9, 300], "and what no answer has, from the lowest on"
    assert frequent(examples, 1, {2}) == [2]


def test_a_training_that_is_stopped_anywhere_ends_as_if_it_had_not_been(
    tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path
) -> None:
    whole = run(settings(tiny_checkpoint, tmp_path / "whole", evaluate_every=2), tiny_target, Tiny(), Alone())
    asked = settings(tiny_checkpoint, tmp_path / "stopped", evaluate_every=2)
    stops = 0
    for patience in (2, 30, 55, 70):  # number of calls of stop(): while it answers, trains and measures
        left = patience

        def stop() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        try:
            run(asked, tiny_target, Tiny(), Alone(), stop)
        except Interrupted:
            stops += 1
    assert stops >= 2
    assert run(asked, tiny_target, Tiny(), Alone()) == whole
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_of_other_settings_is_refused_by_name(tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path) -> None:
    asked = settings(tiny_checkpoint, tmp_path)
    run(asked, tiny_target, Tiny(), Alone())
    for other, name in (
        (replace(asked, train=replace(asked.train, rate=1e-3)), "rate was 0.005, now 0.001"),
        (replace(asked, temperatures=(0.0,)), "temperatures"),
        (replace(asked, sizes=Sizes(num_latents=2, block=4)), "draft"),
    ):
        with pytest.raises(ConfigError, match=name):
            run(other, tiny_target, Tiny(), Alone())
    with pytest.raises(ConfigError, match="data was tiny, now other"):
        run(asked, tiny_target, Tiny(digest="other"), Alone())
    run(replace(asked, train=replace(asked.train, save_every=1.0)), tiny_target, Tiny(), Alone())


def test_answers_follow_the_grammars_of_their_prompts(
    tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path
) -> None:
    """Those that are learnt from and those that are measured; one that cannot be compiled is left out with a reason."""
    three = Grammar("regex", "[a-c]{12}")
    bad = Grammar("json_schema", '{"type": "strin"}', "data.jsonl:2: json_schema")
    bound = Tiny(grammars={0: three, 1: bad, 2: three, 6: three})
    figures = run(settings(tiny_checkpoint, tmp_path), tiny_target, bound, Alone())
    texts = {
        each.number: tiny_target.tokenizer.decode(each.answer, skip_special_tokens=True)
        for each in read_answers(tmp_path / "run" / "answers.jsonl")
    }
    assert texts.keys() == {0, 2, 4, 5}
    assert [bool(re.fullmatch("[a-c]{12}", text)) for _, text in sorted(texts.items())] == [True, True, False, False]
    assert "data.jsonl:2: json_schema: the json schema cannot be compiled" in (tmp_path / "README.md").read_text()
    assert figures["video"]["prompts"] == 1
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tmp_path), max_num_seqs=2, adaptive_drafting=False))
    measured = acceptance(engine, bound.messages, (6,), grammar=bound.grammar, max_tokens=20)
    assert measured.tokens <= 14, "twelve letters and an end, not the twenty tokens of a free answer"
    assert measured.as_json()["length"] == figures["video"]["length"]


def test_a_draft_goes_on_from_another(tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path) -> None:
    first = settings(tiny_checkpoint, tmp_path / "first", sizes=Sizes(num_latents=4, block=4, vocabulary=80))
    run(first, tiny_target, Tiny(), Alone())
    further = settings(tiny_checkpoint, tmp_path / "further", sizes=Sizes(), init=tmp_path / "first", rate=1e-9)
    run(further, tiny_target, Tiny(train=(4, 5)), Alone())
    one, other = weights(tmp_path / "first"), weights(tmp_path / "further")
    assert one.keys() == other.keys()
    assert one["offered"].equal(other["offered"]), "its vocabulary too, whatever the new answers have"
    for name, weight in one.items():
        torch.testing.assert_close(other[name].float(), weight.float(), rtol=0.02, atol=1e-4)
    run(
        replace(further, output=tmp_path / "learnt", train=replace(further.train, rate=5e-3)),
        *(tiny_target, Tiny(), Alone()),
    )
    assert not same(tmp_path / "first", tmp_path / "learnt"), "its weights learn"
    run(replace(first, output=tmp_path / "other", train=replace(first.train, seed=3)), *(tiny_target, Tiny(), Alone()))
    for wrong, complaint in (
        (replace(further, init=tmp_path / "other"), "init was .*, now "),
        (replace(further, init=tmp_path / "nothing", output=tmp_path / "new"), "cannot be read"),
        (replace(further, drafter="medusa", output=tmp_path / "new"), "is of --drafter flash, not medusa"),
        (replace(further, sizes=Sizes(block=5), output=tmp_path / "new"), "leave out the option for its block"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            run(wrong, tiny_target, Tiny(train=(4, 5)), Alone())


def test_strict_refuses_what_cannot_be_used(tiny_checkpoint: Path, tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.jsonl:4: broken"):
        run(settings(tiny_checkpoint, tmp_path, strict=True), tiny_target, Tiny(), Alone())


def test_measuring_ends_in_time_and_leaves_the_engine_idle(plain_engine: Engine) -> None:
    measured = acceptance(plain_engine, Tiny().messages, (0, 1, BAD, 2), max_tokens=5)
    assert measured == Acceptance(prompts=3), "nothing was drafted; what cannot be read is passed over"
    assert measured.length == 1.0
    cut = acceptance(plain_engine, Tiny().messages, range(4, 90), max_tokens=5, seconds=0.0)
    assert cut.prompts == 1
    tiny.assert_idle(plain_engine)


def test_figures_add_up() -> None:
    both = Acceptance(10, 4, (3, 2), 1) + Acceptance(2, 2, (), 1)
    assert both == Acceptance(12, 6, (3, 2), 2)
    assert both.as_json() == {"length": 2.0, "positions": [0.5, 0.333], "drafts": 6, "prompts": 2}


def test_defaults_follow_the_target() -> None:
    """The bundled target's draft keeps its shape; a published target's is half as wide, and fits into memory."""
    assert (width(256), width(64), width(3584)) == (256, 64, 1792)
    large = DraftConfig(64, 64, vocab_size=152_064, aux_layers=(1,))
    assert anchors(16, replace(large, vocab_size=768)) == 24
    assert 1 <= anchors(16, large) < 24
    assert anchors(16, replace(large, vocabulary=768)) == 24
    assert spread(range(10), 3) == spread(range(10), 3)
    assert spread(range(3), 9) == [0, 1, 2]


def test_the_second_signal_interrupts_at_once() -> None:
    with on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), 15)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), 15)


# -- several processes


MEMBER = """
import sys
from pathlib import Path
import torch
from model.train.run import open_target, run
from model.train.team import gather
from tests.model.test_train_run import TWO_BOUND, Tiny, settings
torch.set_num_threads(1)
team = gather()
asked = settings(Path(sys.argv[1]), Path(sys.argv[2]))
run(asked, open_target(asked.target, asked.drafter), Tiny(grammars=TWO_BOUND), team)
"""
TWO_BOUND = {number: Grammar("regex", "[a-c]{9}") for number in (1, 2)}


@pytest.mark.slow
def test_two_processes_end_where_one_of_twice_the_accumulation_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Gradients are averaged through accelerate, over gloo; otherwise processes would end with different weights."""
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", MEMBER, str(tiny_checkpoint), str(tmp_path / "two")]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    members = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [member.wait(200) for member in members] == [0, 0]
    finally:
        for member in members:
            member.kill()
    alone = settings(tiny_checkpoint, tmp_path / "one", accumulate=2)
    from model.train.run import open_target

    run(alone, open_target(alone.target, "flash"), Tiny(grammars=TWO_BOUND), Alone())
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        # Sums in another order round differently, and drafts are stored in bfloat16.
        torch.testing.assert_close(two[name].float(), weight.float(), rtol=0.02, atol=2e-3)
    parts = [read_answers(tmp_path / "two" / "run" / name) for name in ("answers.jsonl", "answers-1.jsonl")]
    assert all(parts), "each has asked for its share"
    assert sorted(e.number for part in parts for e in part) == [0, 1, 2, 4, 5]


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert isinstance(gather(), Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"flashserve\[train\]"):
        gather()
