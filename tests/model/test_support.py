"""Test that variants of attention are those of transformers, and that what shows only in long prompts is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from model.backends import attention
from model.backends.native import library
from model.config import EngineConfig
from model.engine.engine import Engine
from model.errors import ConfigError
from model.targets import support
from model.targets.registry import load_target
from tests.model import tiny
from tests.model.test_equality import CONTENTS, generated

WINDOW = 48


def refusal(folder: Path, **settings: Any) -> str:
    """Return the message with which the target of a checkpoint is refused."""
    with pytest.raises(ConfigError) as refused:
        load_target(tiny.config(folder, **settings).resolved())
    return str(refused.value)


# -- windows

WINDOWED: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "Qwen2, some layers": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "Gemma 3": (Gemma3TextConfig, {"sliding_window": WINDOW, "head_dim": 32}),
    "Phi 3": (Phi3Config, {"sliding_window": WINDOW}),
}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("content", ["image", "text"])
def test_a_window_applies_as_in_transformers(name: str, content: str, tmp_path: Path) -> None:
    """Windows were once ignored, and answers were wrong from the window's length on."""
    family, text = WINDOWED[name]
    folder = tiny.save_checkpoint(tmp_path, family=family, text=text)
    engine = Engine(tiny.config(folder, max_num_seqs=2, dtype="float32"))
    ours = tiny.answers(engine, [tiny.ask("r", *CONTENTS[content], max_tokens=80, ignore_eos=False)])["r"]
    assert ours == generated(folder, CONTENTS[content], 80)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_window_as_long_as_the_context_never_applies(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, a LLaVA on Mistral has a window of 4096 at max_model_len 4096; test to the last position."""
    folder = tiny.save_checkpoint(tmp_path, family=MistralConfig, text={"sliding_window": 64})
    if backend == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    engine = Engine(tiny.config(folder, max_model_len=64, max_num_seqs=2))
    assert engine.target.native == (library.load() is not None)
    content = CONTENTS["image"]
    length = len(engine.prepare(tiny.ask("r", *content, max_tokens=1)).prompt.ids)
    ours = tiny.answers(engine, [tiny.ask("r", *content, max_tokens=64 - length, ignore_eos=False)])["r"]
    assert ours == generated(folder, content, 64 - length)


def test_layers_with_neither_attention_nor_a_known_state_are_refused(tmp_path: Path) -> None:
    layers = ["full_attention", "linear_attention", "full_attention", "chunked_attention"]
    folder = tiny.save_checkpoint(tmp_path, family=Qwen2Config, text={"layer_types": layers})
    assert "cannot be" in refusal(folder)


def test_chunked_attention_is_a_window(tmp_path: Path) -> None:
    layers = ["full_attention", "chunked_attention"]
    text = LlamaConfig(layer_types=layers, attention_chunk_size=WINDOW, num_hidden_layers=2)
    assert support.windows(text) == {"attention_chunk_size": WINDOW}


# -- soft-capping and sinks


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_is_that_of_transformers(field: str, tmp_path: Path) -> None:
    text = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 32, field: 3.0}
    folder = tiny.save_checkpoint(tmp_path, family=Gemma2Config, text=text)
    engine = Engine(tiny.config(folder, max_num_seqs=2, dtype="float32"))
    ours = tiny.answers(engine, [tiny.ask("r", *CONTENTS["image"], max_tokens=40, ignore_eos=False)])["r"]
    assert ours == generated(folder, CONTENTS["image"], 40)


# -- rope

LONG = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "longrope", **LONG, "original_max_position_embeddings": 128}, 128),
        ({"rope_type": "longrope", **LONG, "original_max_position_embeddings": 256}, 256),
    ],
    ids=lambda value: str(value.get("rope_type")) if isinstance(value, dict) else str(value),
)
def test_a_rope_that_looks_at_its_neighbours_is_served_only_where_it_cannot_switch(
    rope: dict[str, Any], limit: int, tmp_path: Path
) -> None:
    """Such a RoPE chooses frequencies by the longest sequence of a batch.

    So the same request would get another answer beside a long one. Drafted tokens have positions, too.
    """
    folder = tiny.save_checkpoint(tmp_path, text={"rope_parameters": {"rope_theta": 10000.0, **rope}})
    said = refusal(folder, max_model_len=limit, max_nodes=10)
    assert f"'{rope['rope_type']}'" in said
    assert f"--max-model-len {limit - 10} or less" in said
    engine = Engine(tiny.config(folder, max_model_len=limit - 10, max_nodes=10, max_num_seqs=2))
    content = CONTENTS["image"]
    length = len(engine.prepare(tiny.ask("r", *content, max_tokens=1)).prompt.ids)
    tokens = min(40, limit - 10 - length)
    ours = tiny.answers(engine, [tiny.ask("r", *content, max_tokens=tokens, ignore_eos=False)])["r"]
    assert ours == generated(folder, content, tokens)


# -- what reaches the attention all the same


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"dropout": 0.0, "use_cache": False, "position_ids": torch.zeros(1)}, True),
        ({"sliding_window": None, "softcap": None, "s_aux": None}, True),
        ({"sliding_window": 100}, True),
        ({"sliding_window": 2}, True),
        ({"softcap": 50.0}, True),
        ({"s_aux": torch.zeros(1)}, True),
        ({"position_bias": torch.zeros(1)}, False),
        ({"is_causal": False}, False),
        ({"dropout": 0.1}, False),
        ({"invented_next_year": 1}, False),
    ],
    ids=str,
)
def test_arguments_of_attention_are_implemented_or_refused(options: dict[str, Any], fits: bool) -> None:
    """They were once dropped silently."""
    from tests.model.test_attention import cache

    kv = cache(1, capacity=100)
    rows = attention.prompt_rows(kv, kv.allocate(), 0, 3)
    query, key, value = torch.randn(3, 1, 1, 3, 8)
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    if fits:
        attention._kv_slots(module, query, key, value, None, plan=rows.plan, **options)
        return
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        attention._kv_slots(module, query, key, value, None, plan=rows.plan, **options)


def test_a_mask_of_the_models_own_is_refused() -> None:
    assert "attention_mask" in str(attention.unsupported(torch.zeros(1), {}))


def test_the_engine_refuses_before_weights_are_read(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    folder = tiny.save_checkpoint(tmp_path, text={"rope_parameters": rope})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="dynamic"):
        Engine(EngineConfig(model=str(folder), device="cpu"))
