"""Test the engine's options, and the error messages for options that it cannot satisfy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.backends.kv_cache import KVCache, uniform
from model.config import MOST_NODES, MOST_VERIFY_TOKENS, TRAINED, WIDEST_TREE, EngineConfig
from model.engine.engine import Engine
from model.errors import ConfigError
from model.targets.base import evenly_spaced
from tests.model import tiny


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drafter", "eagles"),
        ("dtype", "int8"),
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("max_model_len", 15),
        ("threads", 0),
        ("prefill_chunk", 15),
        ("max_verify_tokens", 0),
        ("max_verify_tokens", 65_537),
        ("max_nodes", -1),
        ("max_nodes", 1025),
        ("tree_width", 0),
        ("tree_width", 65),
        ("encoder_cache_bytes", -1),
    ],
)
def test_a_bad_setting_fails_at_start_by_its_name(name: str, value: object) -> None:
    """The error comes neither at the first request nor with the name of an internal function."""
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_resolving_makes_a_new_config_without_any_auto(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    given = EngineConfig(model=str(tiny_checkpoint), device="cpu")
    resolved = given.resolved()
    assert given.dtype == "auto"
    assert (resolved.device, resolved.drafter) == ("cpu", "off")
    assert resolved.dtype in ("float32", "bfloat16")
    assert dataclasses.replace(given, draft=str(tiny_draft)).resolved().drafter == "flash"
    assert dataclasses.replace(given, draft=str(tiny_draft), drafter="off").resolved().drafter == "off"
    assert resolved.resolved() == resolved


def test_a_drafter_without_a_draft_says_what_would_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--draft"):
        EngineConfig(model=str(tiny_checkpoint), drafter="flash", device="cpu").resolved()
    with pytest.raises(ConfigError, match="nowhere"):
        EngineConfig(model=str(tiny_checkpoint), draft=str(tmp_path / "nowhere"), device="cpu").resolved()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_says_so(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="cuda"):
        EngineConfig(model=str(tiny_checkpoint), device="cuda").resolved()


def test_a_model_that_cannot_be_served_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        Engine(tiny.config(tmp_path / "missing"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="bert.*llava"):
        Engine(tiny.config(tmp_path))


def test_the_models_own_limit_on_length_holds(tiny_checkpoint: Path) -> None:
    """Positions beyond it were never trained; a setting cannot stretch them."""
    engine = Engine(EngineConfig(model=str(tiny_checkpoint), device="cpu", max_num_seqs=1))
    assert engine.max_model_len == 512
    assert Engine(tiny.config(tiny_checkpoint, max_num_seqs=1, max_model_len=512)).max_model_len == 512
    with pytest.raises(ConfigError, match="max_model_len must be at most 512"):
        Engine(tiny.config(tiny_checkpoint, max_num_seqs=1, max_model_len=513))


@pytest.mark.parametrize("layers", range(1, 60))
def test_tapped_layers_exist_and_are_spread(layers: int) -> None:
    aux_hidden_states = evenly_spaced(layers)
    assert list(aux_hidden_states) == sorted(set(aux_hidden_states))
    assert all(0 <= t < layers for t in aux_hidden_states)
    assert aux_hidden_states[-1] >= layers / 2 or layers == 1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_very_few_layers_can_be_served(layers: int, tmp_path: Path) -> None:
    """Many test suites use tiny models; the captured layers must exist in them, too."""
    engine = Engine(tiny.config(tiny.save_checkpoint(tmp_path / "few", layers=layers), max_num_seqs=1))
    assert len(tiny.answers(engine, [tiny.ask("r", "Hi", max_tokens=3)])["r"]) == 3


def test_memory_is_known_before_the_first_request(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), max_num_seqs=3, encoder_cache_bytes=1000))
    memory, target = engine.info.memory, engine.target
    each = KVCache.bytes_per_slot(
        layers=uniform(target.num_layers, target.num_kv_heads, target.head_dim),
        capacity=engine.max_model_len,
        margin=engine.config.nodes + 1,
        dtype=target.dtype,
    )
    assert memory["kv_cache"] == 3 * each
    assert memory["encoder_cache"] == 1000
    stored = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert 0.9 * stored < memory["weights"] < 2 * stored, "packed once, not kept twice"
    assert 0 < memory["draft_weights"] < 5 * (tiny_draft / "model.safetensors").stat().st_size, "rotary tables included"
    plain = Engine(tiny.config(tiny_checkpoint, max_num_seqs=1)).info.memory
    assert plain.keys() == {"weights", "kv_cache", "encoder_cache"}


@pytest.mark.parametrize("width", [16, WIDEST_TREE], ids=["natively", "by torch"])
@pytest.mark.parametrize("drafter", [*TRAINED, "ngram"])
def test_the_largest_trees_and_the_widest_can_be_drafted(
    drafter: str, width: int, tiny_checkpoint: Path, drafts: dict[str, Path]
) -> None:
    """The engine must work at the upper bounds of these settings."""
    largest = {"max_nodes": MOST_NODES, "tree_width": width, "max_verify_tokens": MOST_VERIFY_TOKENS, "max_num_seqs": 2}
    requests = [tiny.ask(f"r{i}", "Hi", max_tokens=8) for i in range(2)]
    plain = tiny.answers(Engine(tiny.config(tiny_checkpoint, drafter="off")), requests)
    assert tiny.answers(tiny.engine_of(drafter, tiny_checkpoint, drafts, **largest), requests) == plain
