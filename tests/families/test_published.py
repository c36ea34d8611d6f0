"""The configurations of checkpoints that people use: their plans are right; with few layers they load and answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.sizing import MemoryPlan, Needs, Sizing
from model.errors import ConfigError
from model.targets import registry
from tests.families import cases
from tests.families.published import FOLDER, PUBLISHED, Published, build
from tests.model import tiny

GIB, MIB = 1 << 30, 1 << 20
QUICK = ("PaddleOCR-VL",)
EACH = pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.name)
FIRST_OF_FAMILY = {p.family: p for p in reversed(PUBLISHED)}.values()  # two of one family differ in widths alone
BUILT = [pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.slow) for p in FIRST_OF_FAMILY]

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations


@pytest.fixture
def described(tmp_path: Path) -> Callable[[Published], Path]:
    """Return a function that makes a folder with a published config alone."""

    def write(published: Published) -> Path:
        shutil.copy(FOLDER / f"{published.name}.json", tmp_path / "config.json")
        return tmp_path

    return write


def plan(folder: Path, **settings: Any) -> MemoryPlan:
    options = {"dtype": "bfloat16", "device": "cpu", "free_host_memory": 512 * GIB, "max_num_seqs": 4, **settings}
    config = EngineConfig(model=str(folder), **options).resolved()
    return Sizing.read(config, None).plan(Needs.of_checkpoint(config, registry.open_checkpoint(config)))


@EACH
def test_the_whole_model_is_planned_and_refused_where_it_does_not_fit(
    published: Published, described: Callable[[Published], Path]
) -> None:
    planned = plan(described(published), max_model_len=8192)
    text = registry.open_checkpoint(planned.config).checkpoint.get_text_config()
    beside = 2 * text.vocab_size * text.hidden_size + 0.15e9  # for the native library: a packed head, rotations
    assert 2e9 * published.parameters * 0.99 < planned.needs.weights
    assert planned.needs.weights < 2e9 * published.parameters * 1.01 + beside
    if published.token_bytes is not None:
        assert planned.kv_bytes(32768 + 4096) - planned.kv_bytes(32768) == 4096 * published.token_bytes
    assert planned.num_sequences == 4
    rooms = {
        planned.fixed + planned.kv_bytes(8192) // 2: "not even one sequence of 8192 tokens fits into memory.*give --m",
        planned.needs.weights // 2: "free some memory",
    }
    for room, reason in rooms.items():
        with pytest.raises(ConfigError, match=reason):
            replace(planned, sizing=replace(planned.sizing, budget=room)).check()


def test_layers_with_windows_keep_only_those(described: Callable[[Published], Path]) -> None:
    (gemma,) = (p for p in PUBLISHED if p.name == "gemma-3-4b-it")
    planned = plan(described(gemma), max_model_len=32768)
    assert planned.kv_bytes(32768) < 32768 * 34 * 2 * 4 * 256 * 2 / 4


@pytest.mark.parametrize("published", BUILT)
def test_with_few_layers_it_loads_and_answers_in_the_memory_that_was_planned(
    published: Published, tmp_path: Path
) -> None:
    folder = build(published, tmp_path)
    settings = tiny.config(folder, dtype="float32", max_num_seqs=2, max_model_len=1024, encoder_cache_bytes=MIB)
    config = settings.resolved()
    planned = Sizing.read(config, None).check_before_loading(registry.open_checkpoint(config))
    engine = Engine(settings)
    memory = engine.info.memory
    assert planned.needs.weights == pytest.approx(memory["weights"], rel=0.1)
    cache = memory["kv_cache"] + memory.get("states", 0)
    assert 2 * planned.kv_bytes(1024) == pytest.approx(cache, rel=0.1)
    requests = [
        tiny.ask("text", "What is it?", max_tokens=4),
        tiny.ask("image", cases.image(1, 90, 70), "What is it?", max_tokens=4),
    ]
    answers = tiny.answers(engine, requests)
    assert {name: len(tokens) for name, tokens in answers.items()} == {"text": 4, "image": 4}
