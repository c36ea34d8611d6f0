"""Test that a draft can be trained for families that have no code of their own, and that it is then served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.config import EngineConfig
from model.drafters.presets import Sizes
from model.engine.engine import Engine
from model.request import Message, Request, SamplingParams
from model.targets.registry import load_target
from model.train.run import Settings, run
from model.train.team import Alone
from model.train.trainer import TrainConfig
from tests.families import cases, gemma, qwen, tiles, zoo  # noqa: F401  (they enter their families)

PROMPTS, TOKENS = 6, 24


@dataclass(frozen=True)
class Pictures:
    """Offer a few prompts, which are trained on and measured on: random models have nothing general to learn."""

    digest: str = "pictures"
    summary: str = "a few pictures"
    train: tuple[int, ...] = tuple(range(PROMPTS))
    held_out: tuple[int, ...] = tuple(range(PROMPTS))

    def messages(self, number: int) -> tuple[Message, ...]:
        return (Message("user", ("Look:", cases.image(number, 61 + 4 * number, 47), "What is it?")),)

    def grammar(self, number: int) -> None:
        return None

    def kind(self, number: int) -> str:
        return "image"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "gemma3", "qwen3_5"])
def test_a_draft_learns_from_a_family_without_code_of_its_own(name: str, tmp_path: Path) -> None:
    """Deepstack rows, tiles, two-way blocks and layers with a state lie behind what the draft reads: hidden states."""
    folder = zoo.FAMILIES[name].save(tmp_path / "target")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 0}))  # answers go on
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", drafter="off", max_model_len=512)
    target = load_target(config.resolved())
    settings = Settings(
        target=config.resolved(),
        output=tmp_path / "draft",
        command="a test",
        drafter="flash",
        sizes=Sizes(num_latents=4, block=4),
        max_tokens=TOKENS,
        temperatures=(0.0,),
        train=TrainConfig(steps=80, batch=3, anchors=16, warmup=4, rate=5e-3, autocast=False, evaluate_every=0),
    )
    figures = run(settings, target, Pictures(), Alone())
    assert figures["all"]["length"] > 1.8, "of an untrained draft it is about 1"
    speculating = Engine(
        EngineConfig(
            model=str(folder),
            draft=str(tmp_path / "draft"),
            device="cpu",
            dtype="float32",
            max_model_len=512,
            adaptive_drafting=False,
        )
    )
    plain = Engine(config)
    answers = []
    for engine in (plain, speculating):
        engine.add(Request("r", Pictures().messages(1), SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        answers.append([token.id for output in outputs for token in output.tokens])
        assert outputs[-1].stats is not None
        accepted = outputs[-1].stats.accepted_tokens
    assert answers[0] == answers[1]
    assert accepted > 0
