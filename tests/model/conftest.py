"""Create tiny checkpoints and engines once a session; see tiny.py. No fixture takes more than a second or two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.config import TRAINED
from model.engine.engine import Engine
from model.targets.base import Target
from tests.model import tiny, tiny_qwen


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a real LLaVA checkpoint: 4 layers, width 64, 2 heads; 16 tokens an image."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def tiny_gqa_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint of the same shape whose two query heads share one KV head, with other weights."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny_gqa") / "target", kv_heads=1, seed=1)


@pytest.fixture(scope="session")
def tiny_draft(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an untrained FLASH draft for `tiny_checkpoint`; its proposals are nearly always wrong."""
    return tiny.save_draft(tmp_path_factory.mktemp("tiny") / "draft", tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_gqa_draft(tiny_gqa_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an untrained FLASH draft for `tiny_gqa_checkpoint`."""
    return tiny.save_draft(tmp_path_factory.mktemp("tiny_gqa") / "draft", tiny_gqa_checkpoint)


@pytest.fixture(scope="session")
def drafts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save an untrained draft of every kind for `tiny_checkpoint`."""
    folder = tmp_path_factory.mktemp("drafts")
    return {name: tiny.save_network(folder / name, name, tiny_checkpoint) for name in TRAINED}


@pytest.fixture(scope="session")
def plain_engine(tiny_checkpoint: Path) -> Engine:
    """Start the reference engine: one sequence at a time, without a draft. Every test leaves it idle."""
    return Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=1, max_model_len=384))


@pytest.fixture(scope="session")
def crowd_engine(tiny_checkpoint: Path, tiny_draft: Path) -> Engine:
    """Start an engine of 16 sequences with the untrained FLASH draft and chunks of 16. Every test leaves it idle."""
    return Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=16, prefill_chunk=16))


@pytest.fixture
def crowd(crowd_engine: Engine) -> Iterator[Engine]:
    """Yield `crowd_engine` with its counters reset; a test may replace its drafter."""
    drafter = crowd_engine.drafter
    crowd_engine.pop_stats()
    yield crowd_engine
    for sequence in (*crowd_engine.scheduler.running, *crowd_engine.scheduler.waiting):  # left over by a failed test
        crowd_engine.abort(sequence.request.request_id)
    crowd_engine.use(drafter)
    tiny.assert_idle(crowd_engine)


@pytest.fixture(scope="session")
def tiny_target(plain_engine: Engine) -> Target:
    """Return the target of the reference engine."""
    return plain_engine.target


# -- the same for Qwen2.5-VL, see tiny_qwen.py


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen2.5-VL checkpoint: 4 layers, width 64, 2 query heads, 1 KV head; 4 to 36 tokens an image."""
    return tiny_qwen.save_checkpoint(tmp_path_factory.mktemp("qwen") / "target")


@pytest.fixture(scope="session")
def qwen_draft(qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an untrained FLASH draft for `qwen_checkpoint`."""
    return tiny.save_draft(tmp_path_factory.mktemp("qwen") / "draft", qwen_checkpoint)


@pytest.fixture(scope="session")
def qwen_plain(qwen_checkpoint: Path) -> Engine:
    """Start the reference engine: one sequence at a time, without a draft."""
    return Engine(tiny.config(qwen_checkpoint, drafter="off", max_num_seqs=1, max_model_len=384))


@pytest.fixture(scope="session")
def qwen_crowd_engine(qwen_checkpoint: Path, qwen_draft: Path) -> Engine:
    """Start an engine of 16 sequences with the untrained FLASH draft and chunks of 16."""
    return Engine(tiny.config(qwen_checkpoint, draft=str(qwen_draft), max_num_seqs=16, prefill_chunk=16))


@pytest.fixture
def qwen_crowd(qwen_crowd_engine: Engine) -> Iterator[Engine]:
    """Yield `qwen_crowd_engine`; a test may replace its drafter."""
    drafter = qwen_crowd_engine.drafter
    yield qwen_crowd_engine
    for sequence in (*qwen_crowd_engine.scheduler.running, *qwen_crowd_engine.scheduler.waiting):
        qwen_crowd_engine.abort(sequence.request.request_id)
    qwen_crowd_engine.use(drafter)
    tiny.assert_idle(qwen_crowd_engine)
